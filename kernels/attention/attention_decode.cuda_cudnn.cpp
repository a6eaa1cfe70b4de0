// Decode with one new query a sequence by cuDNN, all sequences of one length.
#include "kernels/attention/attention_cudnn.h"

namespace v3b::kern {

SdpaShape sdpa_of(const spec::AttentionDecodeArgs& a, int64_t s) {
  SdpaShape x{};
  x.B = a.B, x.T_q = 1, x.T_k = s;
  x.n_h = a.n_h, x.n_kv = a.n_kv, x.d_qk = a.d_qk, x.d_v = a.d_v;
  x.q = {a.n_h * a.d_qk, a.n_h * a.d_qk, a.d_qk};
  x.k = {a.k_batch, a.k_row, a.k_head}, x.v = {a.v_batch, a.v_row, a.v_head};
  x.o = {a.n_h * a.d_v, a.n_h * a.d_v, a.d_v};
  x.scale = a.scale;
  x.lse = a.lse != nullptr;
  return x;
}
void attention_decode_cuda_cudnn(const spec::AttentionDecodeArgs& a, const CudnnSdpa& plan,
                                 void* scratch, CudaStream stream) {
  cudnn_sdpa(plan, {a.q, a.k, a.v, a.o, a.lse}, scratch, stream);
}

}  // namespace v3b::kern
