// MHA, GQA and MQA decode without tensor cores: how its arguments read as keys of attention_simt.cuh.
#include "kernels/attention/attention_simt.cuh"

namespace v3b::kern {

int64_t attention_decode_cuda_simt_scratch_bytes(const spec::AttentionDecodeArgs& a) {
  return scratch_of(a).bytes();
}
void attention_decode_cuda_simt(const spec::AttentionDecodeArgs& a, void* scratch,
                                CudaStream stream) {
  const SplitScratch s = scratch_of(a);
  Decode p{};
  p.s_q = 1, p.n_h = a.n_h, p.group = a.n_h / a.n_kv, p.d_qk = a.d_qk;
  p.scale2 = log2_scale(a.scale), p.empty_lse = a.empty_lse, p.q = a.q;
  p.schedule = {a.cache_seqlens, static_cast<int>(a.B), kTile, static_cast<int>(s.slots - a.B)};
  p.keys = {.k1 = a.k, .v = a.v, .k1_row = a.k_row, .v_row = a.v_row, .d1 = a.d_qk, .d_v = a.d_v};
  p.k_batch = a.k_batch, p.k_head = a.k_head, p.v_batch = a.v_batch, p.v_head = a.v_head;
  p.o = a.o, p.lse = a.lse, p.partial = s.partial(scratch), p.lse2 = s.lse2(scratch);
  run(p, a.B, a.dtype, stream);
}

}  // namespace v3b::kern
