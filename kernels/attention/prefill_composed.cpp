#include "kernels/attention/prefill_composed.h"

#include <algorithm>
#include <limits>

#include "kernels/attention/softmax_block.h"
#include "kernels/core/buffer.h"
#include "kernels/gemm/gemm.h"

namespace v3b::kern {
namespace {
constexpr int64_t kQueries = 128;

struct Scratch {
  Buffer<float> s, o, m, l;
  Buffer<uint8_t> p, k;
};

void run_block(const PrefillHead& h, int64_t t0, int64_t n, Scratch& w) {
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
  gemm_onednn(g);
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
  gemm_onednn(v);
  for (int64_t i = 0; i < n; ++i) {
    const float lse = finish_softmax_row(w.o.data() + i * h.d_v, h.d_v, m[i], l[i], h.dtype,
                                         h.o + (t0 + i) * h.o_stride * e, h.empty_lse);
    if (h.lse) h.lse[(t0 + i) * h.lse_stride] = lse;
  }
}
}  // namespace

void prefill_composed(int64_t T, int64_t n_h, const std::function<PrefillHead(int64_t)>& head_at) {
  const int64_t blocks = (T + kQueries - 1) / kQueries;
#pragma omp parallel for schedule(dynamic)
  for (int64_t i = 0; i < n_h * blocks; ++i) {
    static thread_local Scratch w;
    const int64_t t0 = (blocks - 1 - i / n_h) * kQueries;
    run_block(head_at(i % n_h), t0, std::min(kQueries, T - t0), w);
  }
}

}  // namespace v3b::kern
