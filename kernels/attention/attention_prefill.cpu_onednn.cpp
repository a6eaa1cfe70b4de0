// Baseline of attention_prefill: oneDNN products with softmax between (prefill_composed.h).
#include "kernels/attention/attention.h"
#include "kernels/attention/prefill_composed.h"
#include "kernels/attention/softmax_block.h"

namespace v3b::kern {

void attention_prefill_cpu_onednn(const spec::AttentionArgs& a) noexcept {
  const int64_t e = spec::dtype_bytes(a.dtype);
  prefill_composed(a.T, a.n_h, [&](int64_t h) {
    const int64_t g = h * a.n_kv / a.n_h;
    PrefillHead r{a.T,
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

}  // namespace v3b::kern
