// Expanded MLA prefill without tensor cores: how its arguments read as keys of attention_simt.cuh.
#include "kernels/attention/attention_simt.cuh"

namespace v3b::kern {

void mla_prefill_cuda_simt(const spec::MlaPrefillArgs& a, CudaStream stream) {
  Prefill p{};
  p.T = a.T, p.s0 = a.s0, p.n_h = a.n_h, p.group = 1, p.d_qk = a.d_n + a.d_r;
  p.scale2 = log2_scale(a.scale), p.empty_lse = spec::EmptyLse::pos_inf, p.q = a.q;
  p.keys = {.k1 = a.kv,
            .k2 = a.k_pe,
            .v = at_element(a.kv, a.d_n, a.dtype),
            .k1_row = a.kv_stride,
            .k2_row = a.k_pe_stride,
            .v_row = a.kv_stride,
            .d1 = a.d_n,
            .d2 = a.d_r,
            .d_v = a.d_v};
  p.k_head = p.v_head = a.d_n + a.d_v, p.q_stride = a.q_stride, p.o_stride = a.o_stride;
  p.o = a.o, p.lse = a.lse;
  run(p, a.dtype, stream);
}

}  // namespace v3b::kern
