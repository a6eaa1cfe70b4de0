// Causal prefill of expanded MLA, reading [k_nope | v] and k_pe where the projections left them
// (rows_prefill.h).
#include "kernels/attention/attention.h"
#include "kernels/attention/rows_prefill.h"

namespace v3b::kern {

void mla_prefill_cpu_simd(const spec::MlaPrefillArgs& a) noexcept {
  const int64_t e = spec::dtype_bytes(a.dtype);
  RowsTask t;
  t.d_qk = a.d_n + a.d_r, t.d_v = a.d_v, t.scale = static_cast<float>(a.scale), t.dtype = a.dtype;
  t.q = a.q, t.o = a.o, t.lse = a.lse, t.q_outer = a.q_stride, t.o_outer = a.o_stride;
  t.keys.d1 = a.d_n;
  t.keys.d2 = a.d_r;
  t.keys.k1_stride = t.keys.v_stride = a.kv_stride * e;
  t.keys.k2 = static_cast<const uint8_t*>(a.k_pe);
  t.keys.k2_stride = a.k_pe_stride * e;
  run_prefill(a.T, a.s0, a.n_h, a.n_h, t, [&](RowsTask& task, int64_t h) {
    task.keys.k1 = static_cast<const uint8_t*>(a.kv) + h * (a.d_n + a.d_v) * e;
    task.keys.v = task.keys.k1 + a.d_n * e;
  });
}

}  // namespace v3b::kern
