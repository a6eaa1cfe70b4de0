#include "reference/mla.h"

#include <Eigen/Core>
#include <algorithm>
#include <cmath>
#include <vector>

namespace v3b::ref {
namespace {
template <class S>
using Matrix = Eigen::Matrix<S, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;
template <class S>
using In = Eigen::Map<const Matrix<S>, 0, Eigen::OuterStride<>>;
template <class S>
using Out = Eigen::Map<Matrix<S>, 0, Eigen::OuterStride<>>;

// `cols` columns from `first` of head h of a tensor [rows, n_h, dim].
template <class S>
In<S> head(const S* p, int64_t rows, int64_t n_h, int64_t dim, int64_t h, int64_t first,
           int64_t cols) {
  return {p + h * dim + first, rows, cols, Eigen::OuterStride<>(n_h * dim)};
}
template <class S>
Out<S> head(S* p, int64_t rows, int64_t n_h, int64_t dim, int64_t h, int64_t first, int64_t cols) {
  return {p + h * dim + first, rows, cols, Eigen::OuterStride<>(n_h * dim)};
}
// W_UK^h [d_n, d_c] and W_UV^h [d_v, d_c]
template <class S>
In<S> w_uk(const MlaShape& m, const S* w_kvb, int64_t h) {
  return {w_kvb + h * (m.d_n + m.d_v) * m.d_c, m.d_n, m.d_c, Eigen::OuterStride<>(m.d_c)};
}
template <class S>
In<S> w_uv(const MlaShape& m, const S* w_kvb, int64_t h) {
  return {w_kvb + (h * (m.d_n + m.d_v) + m.d_n) * m.d_c, m.d_v, m.d_c, Eigen::OuterStride<>(m.d_c)};
}
}  // namespace

double mla_scale(int64_t d_qk, double mscale) {
  return mscale * mscale / std::sqrt(static_cast<double>(d_qk));
}

template <class S>
void mla_expand(const MlaShape& m, int64_t s, const S* c, const S* k_pe, const S* w_kvb, S* k,
                S* v) {
  const In<S> C = head(c, s, 1, m.d_c, 0, 0, m.d_c), Kpe = head(k_pe, s, 1, m.d_r, 0, 0, m.d_r);
#pragma omp parallel for if (s * m.n_h > 512)
  for (int64_t h = 0; h < m.n_h; ++h) {
    head(k, s, m.n_h, m.d_qk(), h, 0, m.d_n).noalias() = C * w_uk(m, w_kvb, h).transpose();
    head(k, s, m.n_h, m.d_qk(), h, m.d_n, m.d_r) = Kpe;
    head(v, s, m.n_h, m.d_v, h, 0, m.d_v).noalias() = C * w_uv(m, w_kvb, h).transpose();
  }
}

template <class S>
void mla_expand_backward(const MlaShape& m, int64_t s, const S* c, const S* w_kvb, const S* dk,
                         const S* dv, S* dc, S* dk_pe, S* dw_kvb) {
  const In<S> C = head(c, s, 1, m.d_c, 0, 0, m.d_c);
  Out<S> dC = head(dc, s, 1, m.d_c, 0, 0, m.d_c), dKpe = head(dk_pe, s, 1, m.d_r, 0, 0, m.d_r);
  dC.setZero();
  dKpe.setZero();
  for (int64_t h = 0; h < m.n_h; ++h) {
    const In<S> dKn = head(dk, s, m.n_h, m.d_qk(), h, 0, m.d_n),
                dV = head(dv, s, m.n_h, m.d_v, h, 0, m.d_v);
    dC.noalias() += dKn * w_uk(m, w_kvb, h) + dV * w_uv(m, w_kvb, h);
    dKpe += head(dk, s, m.n_h, m.d_qk(), h, m.d_n, m.d_r);
    Out<S> dW(dw_kvb + h * (m.d_n + m.d_v) * m.d_c, m.d_n + m.d_v, m.d_c,
              Eigen::OuterStride<>(m.d_c));
    dW.topRows(m.d_n).noalias() += dKn.transpose() * C;
    dW.bottomRows(m.d_v).noalias() += dV.transpose() * C;
  }
}

template <class S>
void mla_absorb_q(const MlaShape& m, int64_t T, const S* q, const S* w_kvb, S* q_abs) {
  const int64_t d = m.d_c + m.d_r;
  for (int64_t h = 0; h < m.n_h; ++h) {
    head(q_abs, T, m.n_h, d, h, 0, m.d_c).noalias() =
        head(q, T, m.n_h, m.d_qk(), h, 0, m.d_n) * w_uk(m, w_kvb, h);
    head(q_abs, T, m.n_h, d, h, m.d_c, m.d_r) = head(q, T, m.n_h, m.d_qk(), h, m.d_n, m.d_r);
  }
}

template <class S>
void mla_latent_core(int64_t T, int64_t s0, int64_t n_h, int64_t d_c, int64_t d_r, double scale,
                     const S* q_abs, const S* kv, S* o_lat, S* lse, spec::EmptyLse empty_lse) {
  AttentionShape a{
      .T = T, .s0 = s0, .n_h = n_h, .n_kv = 1, .d_qk = d_c + d_r, .d_v = d_c, .scale = scale};
  a.k_stride = a.v_stride = d_c + d_r;
  a.empty_lse = empty_lse;
  attention_core(a, q_abs, kv, kv, o_lat, lse);
}

template <class S>
void mla_unabsorb(const MlaShape& m, int64_t T, const S* o_lat, const S* w_kvb, S* o) {
  for (int64_t h = 0; h < m.n_h; ++h)
    head(o, T, m.n_h, m.d_v, h, 0, m.d_v).noalias() =
        head(o_lat, T, m.n_h, m.d_c, h, 0, m.d_c) * w_uv(m, w_kvb, h).transpose();
}

template <class S>
void mla_decode_paged(const MlaPagedShape& m, const S* q_abs, const S* cache,
                      const int32_t* block_table, const int32_t* cache_seqlens, S* o_lat, S* lse) {
  const int64_t d = m.d_c + m.d_r, rows = m.s_q * m.n_h;
  std::vector<S, Eigen::aligned_allocator<S>>
      kv;  // the same order of sums wherever the heap puts it
  std::vector<S> lse_rows(lse ? rows : 0);
  for (int64_t b = 0; b < m.B; ++b) {
    const int64_t s = cache_seqlens[b];
    kv.resize(s * d);
    for (int64_t j = 0; j < s; ++j) {
      const int64_t block = block_table[b * m.max_blocks + j / m.page];
      std::copy_n(cache + (block * m.page + j % m.page) * d, d, kv.data() + j * d);
    }
    mla_latent_core(m.s_q, s - m.s_q, m.n_h, m.d_c, m.d_r, m.scale, q_abs + b * rows * d, kv.data(),
                    o_lat + b * rows * m.d_c, lse ? lse_rows.data() : nullptr, m.empty_lse);
    if (!lse) continue;
    for (int64_t i = 0; i < m.s_q; ++i)
      for (int64_t h = 0; h < m.n_h; ++h)
        lse[(b * m.n_h + h) * m.s_q + i] = lse_rows[i * m.n_h + h];
  }
}

#define V3B_INSTANTIATE(S)                                                                        \
  template void mla_expand<S>(const MlaShape&, int64_t, const S*, const S*, const S*, S*, S*);    \
  template void mla_expand_backward<S>(const MlaShape&, int64_t, const S*, const S*, const S*,    \
                                       const S*, S*, S*, S*);                                     \
  template void mla_absorb_q<S>(const MlaShape&, int64_t, const S*, const S*, S*);                \
  template void mla_latent_core<S>(int64_t, int64_t, int64_t, int64_t, int64_t, double, const S*, \
                                   const S*, S*, S*, spec::EmptyLse);                             \
  template void mla_unabsorb<S>(const MlaShape&, int64_t, const S*, const S*, S*);                \
  template void mla_decode_paged<S>(const MlaPagedShape&, const S*, const S*, const int32_t*,     \
                                    const int32_t*, S*, S*);
V3B_INSTANTIATE(float)
V3B_INSTANTIATE(double)

}  // namespace v3b::ref
