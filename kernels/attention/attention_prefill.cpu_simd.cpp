// Causal prefill of any heads (rows_prefill.h).
#include "kernels/attention/attention.h"
#include "kernels/attention/rows_prefill.h"

namespace v3b::kern {
void attention_prefill_cpu_simd(const spec::AttentionArgs& a) noexcept {
  const int64_t e = spec::dtype_bytes(a.dtype);
  RowsTask t;
  t.d_qk = a.d_qk, t.d_v = a.d_v, t.scale = static_cast<float>(a.scale), t.dtype = a.dtype,
  t.empty_lse = a.empty_lse;
  t.q = a.q, t.o = a.o, t.lse = a.lse, t.q_outer = a.q_stride, t.o_outer = a.o_stride;
  t.keys.d1 = a.d_qk;
  t.keys.k1_stride = a.k_stride * e;
  t.keys.v_stride = a.v_stride * e;
  run_prefill(a.T, a.s0, a.n_h, a.n_kv, t, [&](RowsTask& task, int64_t g) {
    task.keys.k1 = static_cast<const uint8_t*>(a.k) + g * a.d_qk * e;
    task.keys.v = static_cast<const uint8_t*>(a.v) + g * a.d_v * e;
  });
}

const char* attention_cpu_simd_isa(spec::DType dtype) noexcept {
  return rows_isa(dtype == spec::DType::bf16);
}

}  // namespace v3b::kern
