// Baseline of mla_prefill: oneDNN products with softmax between (prefill_composed.h).
#include "kernels/attention/attention.h"
#include "kernels/attention/prefill_composed.h"
#include "kernels/attention/softmax_block.h"

namespace v3b::kern {

void mla_prefill_cpu_onednn(const spec::MlaPrefillArgs& a) noexcept {
  const int64_t e = spec::dtype_bytes(a.dtype), d_qk = a.d_n + a.d_r;
  prefill_composed(a.T, a.n_h, [&](int64_t h) {
    PrefillHead r{a.T,
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
