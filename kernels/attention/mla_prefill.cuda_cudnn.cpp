// Expanded MLA prefill by cuDNN, over keys that are built first.
#include "kernels/attention/attention_cudnn.h"

namespace v3b::kern {
namespace {
int64_t padded(int64_t bytes) { return (bytes + 255) / 256 * 256; }
int64_t keys_bytes(const spec::MlaPrefillArgs& a) {
  return padded((a.s0 + a.T) * a.n_h * (a.d_n + a.d_r) * 2);
}
int64_t lse_bytes(const spec::MlaPrefillArgs& a) { return padded(a.T * a.n_h * 4); }
}  // namespace

SdpaShape sdpa_of(const spec::MlaPrefillArgs& a) {
  const int64_t s = a.s0 + a.T, d_qk = a.d_n + a.d_r;
  SdpaShape x{};
  x.B = 1, x.T_q = a.T, x.T_k = s;
  x.n_h = x.n_kv = a.n_h, x.d_qk = d_qk, x.d_v = a.d_v;
  x.q = {a.T * a.q_stride, a.q_stride, d_qk};
  x.k = {s * a.n_h * d_qk, a.n_h * d_qk, d_qk};
  x.v = {s * a.kv_stride, a.kv_stride, a.d_n + a.d_v};
  x.o = {a.T * a.o_stride, a.o_stride, a.d_v};
  x.scale = a.scale;
  x.causal = true;
  x.lse = a.lse != nullptr;
  return x;
}
int64_t mla_prefill_cudnn_scratch_bytes(const spec::MlaPrefillArgs& a, const CudnnSdpa& plan) {
  return keys_bytes(a) + lse_bytes(a) + cudnn_scratch_bytes(plan);
}
void mla_prefill_cuda_cudnn(const spec::MlaPrefillArgs& a, const CudnnSdpa& plan, void* scratch,
                            CudaStream stream) {
  auto* keys = static_cast<uint8_t*>(scratch);
  auto* lse = reinterpret_cast<float*>(keys + keys_bytes(a));
  build_keys_cuda_simt(a, keys, stream);
  cudnn_sdpa(plan, {a.q, keys, static_cast<const uint16_t*>(a.kv) + a.d_n, a.o, lse},
             keys + keys_bytes(a) + lse_bytes(a), stream);
  if (a.lse != nullptr) transpose_lse_cuda_simt(a.T, a.n_h, lse, a.lse, stream);
}

}  // namespace v3b::kern
