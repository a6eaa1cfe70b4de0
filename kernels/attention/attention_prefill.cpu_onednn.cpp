// Causal prefill composed of oneDNN products, as somebody without a fused kernel would: for each
// head and block of queries S = Q K^T over all visible keys, softmax, O = P V. Baseline; S of a
// block goes through memory.
#include <algorithm>

#include "kernels/attention/attention.h"
#include "kernels/attention/rows.h"
#include "kernels/attention/softmax_block.h"
#include "kernels/core/buffer.h"
#include "kernels/gemm/gemm.h"

namespace v3b::kern {
namespace {
constexpr int64_t kQueries = 128;

struct Head {
  int64_t T, s0, d_qk, d_v;
  double scale;
  spec::DType dtype;
  const uint8_t* q;
  uint8_t* o;
  int64_t q_stride, o_stride, lse_stride;  // elements between tokens
  float* lse;
  KeySource keys;
  float empty_lse;
};

struct Scratch {
  Buffer<float> s, o, m, l;
  Buffer<uint8_t> p, k;
};

void run_block(const Head& h, int64_t t0, int64_t n, Scratch& w) {
  const int64_t e = spec::dtype_bytes(h.dtype), keys = std::max<int64_t>(0, h.s0 + t0 + n);
  w.s.reserve_discard(n * keys);
  w.p.reserve_discard(n * keys * e);
  w.o.reserve_discard(n * h.d_v);
  GemmArgs g;
  g.M = n, g.N = keys, g.K = h.d_qk;
  g.a = h.q + t0 * h.q_stride * e, g.lda = h.q_stride;
  g.b = h.keys.k1, g.ldb = h.keys.k1_stride / e;
  if (h.keys.d2 > 0) {
    w.k.reserve_discard(keys * h.d_qk * e);
    rows_fetch(h.keys, 0, keys, h.dtype, w.k.data(), h.d_qk * e);
    g.b = w.k.data(), g.ldb = h.d_qk;
  }
  g.c = w.s.data(), g.ldc = keys;
  g.ab_type = h.dtype;
  gemm(g);
  float m[kQueries], l[kQueries];
  for (int64_t i = 0; i < n; ++i) {
    m[i] = -std::numeric_limits<float>::infinity();
    l[i] = 0;
    const int64_t visible = std::clamp<int64_t>(h.s0 + t0 + i + 1, 0, keys);
    softmax_row(w.s.data() + i * keys, keys, visible, log2_scale(h.scale), h.dtype,
                w.p.data() + i * keys * e, m[i], l[i]);
  }
  GemmArgs v;
  v.M = n, v.N = h.d_v, v.K = keys;
  v.a = w.p.data(), v.lda = keys;
  v.b = h.keys.v, v.ldb = h.keys.v_stride / e, v.trans_b = false;
  v.c = w.o.data(), v.ldc = h.d_v;
  v.ab_type = h.dtype;
  gemm(v);
  for (int64_t i = 0; i < n; ++i) {
    const float lse = finish_softmax_row(w.o.data() + i * h.d_v, h.d_v, m[i], l[i], h.dtype,
                                         h.o + (t0 + i) * h.o_stride * e, h.empty_lse);
    if (h.lse) h.lse[(t0 + i) * h.lse_stride] = lse;
  }
}

template <class HeadAt>
void run_heads(int64_t T, int64_t n_h, const HeadAt& head_at) {
  const int64_t blocks = (T + kQueries - 1) / kQueries;
#pragma omp parallel for schedule(dynamic)
  for (int64_t i = 0; i < n_h * blocks; ++i) {
    static thread_local Scratch w;
    const int64_t t0 = (blocks - 1 - i / n_h) * kQueries;
    run_block(head_at(i % n_h), t0, std::min(kQueries, T - t0), w);
  }
}
}  // namespace

void attention_prefill_cpu_onednn(const spec::AttentionArgs& a) noexcept {
  const int64_t e = spec::dtype_bytes(a.dtype);
  run_heads(a.T, a.n_h, [&](int64_t h) {
    const int64_t g = h * a.n_kv / a.n_h;
    Head r{a.T,
           a.s0,
           a.d_qk,
           a.d_v,
           a.scale,
           a.dtype,
           static_cast<const uint8_t*>(a.q) + h * a.d_qk * e,
           static_cast<uint8_t*>(a.o) + h * a.d_v * e,
           a.q_stride,
           a.o_stride,
           a.n_h,
           a.lse ? a.lse + h : nullptr,
           {},
           empty_lse_of(a.empty_lse)};
    r.keys.k1 = static_cast<const uint8_t*>(a.k) + g * a.d_qk * e;
    r.keys.v = static_cast<const uint8_t*>(a.v) + g * a.d_v * e;
    r.keys.d1 = a.d_qk;
    r.keys.k1_stride = a.k_stride * e;
    r.keys.v_stride = a.v_stride * e;
    return r;
  });
}

void mla_prefill_cpu_onednn(const spec::MlaPrefillArgs& a) noexcept {
  const int64_t e = spec::dtype_bytes(a.dtype), d_qk = a.d_n + a.d_r;
  run_heads(a.T, a.n_h, [&](int64_t h) {
    Head r{a.T,
           a.s0,
           d_qk,
           a.d_v,
           a.scale,
           a.dtype,
           static_cast<const uint8_t*>(a.q) + h * d_qk * e,
           static_cast<uint8_t*>(a.o) + h * a.d_v * e,
           a.q_stride,
           a.o_stride,
           a.n_h,
           a.lse ? a.lse + h : nullptr,
           {},
           empty_lse_of(spec::EmptyLse::pos_inf)};
    r.keys.k1 = static_cast<const uint8_t*>(a.kv) + h * (a.d_n + a.d_v) * e;
    r.keys.v = r.keys.k1 + a.d_n * e;
    r.keys.k1_stride = r.keys.v_stride = a.kv_stride * e;
    r.keys.k2 = static_cast<const uint8_t*>(a.k_pe);
    r.keys.k2_stride = a.k_pe_stride * e;
    r.keys.d1 = a.d_n;
    r.keys.d2 = a.d_r;
    return r;
  });
}

}  // namespace v3b::kern
