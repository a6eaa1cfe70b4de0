#include "reference/attention.h"

#include <Eigen/Core>
#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "reference/rmsnorm.h"

namespace v3b::ref {
namespace {
template <class S>
using Matrix = Eigen::Matrix<S, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;
template <class S>  // rows at a stride: one head of [tokens, heads, dim]
using Rows = Eigen::Map<const Matrix<S>, 0, Eigen::OuterStride<>>;
template <class S>
using OutRows = Eigen::Map<Matrix<S>, 0, Eigen::OuterStride<>>;

constexpr int64_t kQueryBlock = 128;  // bounds the memory of the scores; rows are independent

int64_t k_stride(const AttentionShape& a) { return a.k_stride ? a.k_stride : a.n_kv * a.d_qk; }
int64_t v_stride(const AttentionShape& a) { return a.v_stride ? a.v_stride : a.n_kv * a.d_v; }

// P of queries [i0, i0 + n) of one head over the first `keys` keys: rows sum to 1, or are 0 where
// nothing is visible.
template <class S>
Matrix<S> probabilities(const AttentionShape& a, int64_t i0, const Rows<S>& Q, const Rows<S>& K,
                        S* lse, int64_t lse_stride) {
  Matrix<S> P = S(a.scale) * (Q * K.transpose());
  for (int64_t i = 0; i < P.rows(); ++i) {
    const int64_t visible = std::clamp<int64_t>(a.s0 + i0 + i + 1, 0, P.cols());
    auto row = P.row(i).array();
    row.tail(P.cols() - visible).setZero();
    if (visible == 0) {
      if (lse) lse[i * lse_stride] = empty_lse_value<S>(a.empty_lse);
      continue;
    }
    auto seen = row.head(visible);
    const S max = seen.template maxCoeff<Eigen::PropagateNaN>();
    seen = (seen - max).exp();
    const S sum = seen.sum();
    seen /= sum;
    if (lse) lse[i * lse_stride] = max + std::log(sum);
  }
  return P;
}
}  // namespace

template <class S>
S empty_lse_value(spec::EmptyLse flag) {
  const S inf = std::numeric_limits<S>::infinity();
  return flag == spec::EmptyLse::pos_inf ? inf : -inf;
}

template <class S>
void attention_core(const AttentionShape& a, const S* q, const S* k, const S* v, S* o, S* lse) {
  const int64_t blocks = (a.T + kQueryBlock - 1) / kQueryBlock;
#pragma omp parallel for collapse(2) schedule(dynamic) if (a.T * a.s() * a.n_h > 16384)
  for (int64_t h = 0; h < a.n_h; ++h) {
    for (int64_t b = 0; b < blocks; ++b) {
      const int64_t i0 = b * kQueryBlock, n = std::min(kQueryBlock, a.T - i0),
                    g = h * a.n_kv / a.n_h;
      const int64_t keys =
          std::max<int64_t>(0, a.s0 + i0 + n);  // the last query of the block sees these
      const Rows<S> Q(q + (i0 * a.n_h + h) * a.d_qk, n, a.d_qk,
                      Eigen::OuterStride<>(a.n_h * a.d_qk));
      const Rows<S> K(k + g * a.d_qk, keys, a.d_qk, Eigen::OuterStride<>(k_stride(a)));
      const Rows<S> V(v + g * a.d_v, keys, a.d_v, Eigen::OuterStride<>(v_stride(a)));
      OutRows<S> O(o + (i0 * a.n_h + h) * a.d_v, n, a.d_v, Eigen::OuterStride<>(a.n_h * a.d_v));
      Matrix<S> P = probabilities(a, i0, Q, K, lse ? lse + i0 * a.n_h + h : nullptr, a.n_h);
      if (a.p_dtype != spec::DType::f64)
        P = P.unaryExpr([&](S p) { return round_to(p, a.p_dtype); }).eval();
      O.noalias() = P * V;
    }
  }
}

template <class S>
void attention_core_backward(const AttentionShape& a, const S* q, const S* k, const S* v,
                             const S* d_o, S* dq, S* dk, S* dv) {
  const int64_t s = a.s(), group = a.n_h / a.n_kv;
  std::fill_n(dk, s * a.n_kv * a.d_qk, S(0));
  std::fill_n(dv, s * a.n_kv * a.d_v, S(0));
#pragma omp parallel for schedule(dynamic) if (a.T * s * a.n_h > 16384)
  for (int64_t g = 0; g < a.n_kv; ++g) {  // heads of a group add to the same dk, dv
    for (int64_t h = g * group; h < (g + 1) * group; ++h) {
      for (int64_t i0 = 0; i0 < a.T; i0 += kQueryBlock) {
        const int64_t n = std::min(kQueryBlock, a.T - i0),
                      keys = std::max<int64_t>(0, a.s0 + i0 + n);
        const Eigen::OuterStride<> q_step(a.n_h * a.d_qk), o_step(a.n_h * a.d_v);
        const Rows<S> Q(q + (i0 * a.n_h + h) * a.d_qk, n, a.d_qk, q_step);
        const Rows<S> K(k + g * a.d_qk, keys, a.d_qk, Eigen::OuterStride<>(k_stride(a)));
        const Rows<S> V(v + g * a.d_v, keys, a.d_v, Eigen::OuterStride<>(v_stride(a)));
        const Rows<S> dO(d_o + (i0 * a.n_h + h) * a.d_v, n, a.d_v, o_step);
        OutRows<S> dQ(dq + (i0 * a.n_h + h) * a.d_qk, n, a.d_qk, q_step);
        OutRows<S> dK(dk + g * a.d_qk, keys, a.d_qk, Eigen::OuterStride<>(a.n_kv * a.d_qk));
        OutRows<S> dV(dv + g * a.d_v, keys, a.d_v, Eigen::OuterStride<>(a.n_kv * a.d_v));

        const Matrix<S> P = probabilities<S>(a, i0, Q, K, nullptr, 0);
        const Matrix<S> dP = dO * V.transpose();
        const Eigen::Array<S, Eigen::Dynamic, 1> sum = (dP.array() * P.array()).rowwise().sum();
        const Matrix<S> dS = S(a.scale) * (P.array() * (dP.array().colwise() - sum)).matrix();
        dQ.noalias() = dS * K;
        dK.noalias() += dS.transpose() * Q;
        dV.noalias() += P.transpose() * dO;
      }
    }
  }
}

template <class S>
void attention_merge(int64_t parts, int64_t rows, int64_t d_v, const S* o_parts, const S* lse_parts,
                     S* o, S* lse, spec::EmptyLse empty_lse) {
  using Row = Eigen::Array<S, 1, Eigen::Dynamic>;
  for (int64_t r = 0; r < rows; ++r) {
    S max = -std::numeric_limits<S>::infinity(), sum = 0;
    for (int64_t p = 0; p < parts; ++p)
      if (const S x = lse_parts[p * rows + r]; !std::isinf(x)) max = std::max(max, x);
    Eigen::Map<Row> out(o + r * d_v, d_v);
    out.setZero();
    for (int64_t p = 0; p < parts; ++p) {
      const S x = lse_parts[p * rows + r];
      if (std::isinf(x)) continue;  // no keys in this part
      const S w = std::exp(x - max);
      sum += w;
      out += w * Eigen::Map<const Row>(o_parts + (p * rows + r) * d_v, d_v);
    }
    const bool empty = sum == S(0);
    if (!empty) out /= sum;
    if (lse) lse[r] = empty ? empty_lse_value<S>(empty_lse) : max + std::log(sum);
  }
}

#define V3B_INSTANTIATE(S)                                                                      \
  template S empty_lse_value<S>(spec::EmptyLse);                                                \
  template void attention_core<S>(const AttentionShape&, const S*, const S*, const S*, S*, S*); \
  template void attention_core_backward<S>(const AttentionShape&, const S*, const S*, const S*, \
                                           const S*, S*, S*, S*);                               \
  template void attention_merge<S>(int64_t, int64_t, int64_t, const S*, const S*, S*, S*,       \
                                   spec::EmptyLse);
V3B_INSTANTIATE(float)
V3B_INSTANTIATE(double)

}  // namespace v3b::ref
