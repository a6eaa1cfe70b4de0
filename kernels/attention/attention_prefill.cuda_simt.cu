// MHA, GQA and MQA prefill without tensor cores: how its arguments read as keys of attention_simt.cuh.
#include "kernels/attention/attention_simt.cuh"

namespace v3b::kern {

void attention_prefill_cuda_simt(const spec::AttentionArgs& a, CudaStream stream) {
  Prefill p{};
  p.T = a.T, p.s0 = a.s0, p.n_h = a.n_h, p.group = a.n_h / a.n_kv, p.d_qk = a.d_qk;
  p.scale2 = log2_scale(a.scale), p.empty_lse = a.empty_lse, p.q = a.q;
  p.keys = {
      .k1 = a.k, .v = a.v, .k1_row = a.k_stride, .v_row = a.v_stride, .d1 = a.d_qk, .d_v = a.d_v};
  p.k_head = a.d_qk, p.v_head = a.d_v, p.q_stride = a.q_stride, p.o_stride = a.o_stride;
  p.o = a.o, p.lse = a.lse;
  run(p, a.dtype, stream);
}

}  // namespace v3b::kern
