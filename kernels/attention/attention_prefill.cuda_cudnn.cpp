// Causal prefill by cuDNN.
#include "kernels/attention/attention_cudnn.h"

namespace v3b::kern {
namespace {
int64_t lse_bytes(int64_t T, int64_t n_h) { return (T * n_h * 4 + 255) / 256 * 256; }
}  // namespace

SdpaShape sdpa_of(const spec::AttentionArgs& a) {
  const int64_t s = a.s0 + a.T;
  SdpaShape x{};
  x.B = 1, x.T_q = a.T, x.T_k = s;
  x.n_h = a.n_h, x.n_kv = a.n_kv, x.d_qk = a.d_qk, x.d_v = a.d_v;
  x.q = {a.T * a.q_stride, a.q_stride, a.d_qk}, x.k = {s * a.k_stride, a.k_stride, a.d_qk};
  x.v = {s * a.v_stride, a.v_stride, a.d_v}, x.o = {a.T * a.o_stride, a.o_stride, a.d_v};
  x.scale = a.scale;
  x.causal = true;
  x.lse = a.lse != nullptr;
  return x;
}
int64_t attention_prefill_cudnn_scratch_bytes(const spec::AttentionArgs& a, const CudnnSdpa& plan) {
  return lse_bytes(a.T, a.n_h) + cudnn_scratch_bytes(plan);
}
void attention_prefill_cuda_cudnn(const spec::AttentionArgs& a, const CudnnSdpa& plan,
                                  void* scratch, CudaStream stream) {
  auto* lse = static_cast<float*>(scratch);
  cudnn_sdpa(plan, {a.q, a.k, a.v, a.o, lse},
             static_cast<uint8_t*>(scratch) + lse_bytes(a.T, a.n_h), stream);
  if (a.lse != nullptr) transpose_lse_cuda_simt(a.T, a.n_h, lse, a.lse, stream);
}

}  // namespace v3b::kern
