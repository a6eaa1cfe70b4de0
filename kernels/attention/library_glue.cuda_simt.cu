// What stands between our arguments and a library's attention: see attention_cudnn.h.
#include "kernels/attention/attention_cudnn.h"
#include "kernels/core/cuda_device.cuh"

namespace v3b::kern {
namespace {

constexpr int kThreads = 256;

__global__ void __launch_bounds__(kThreads)
    transpose_kernel(int64_t T, int64_t n_h, const float* x, float* y) {
  const int64_t i = blockIdx.x * static_cast<int64_t>(kThreads) + threadIdx.x;
  if (i < T * n_h) y[i] = x[i % n_h * T + i / n_h];
}

// One block a key: reads kv's rows once, k_pe once.
__global__ void __launch_bounds__(kThreads) keys_kernel(spec::MlaPrefillArgs a, uint16_t* keys) {
  const int64_t t = blockIdx.x, d_qk = a.d_n + a.d_r;
  const auto* kv = static_cast<const uint16_t*>(a.kv) + t * a.kv_stride;
  const auto* pe = static_cast<const uint16_t*>(a.k_pe) + t * a.k_pe_stride;
  for (int64_t i = threadIdx.x; i < a.n_h * d_qk; i += kThreads) {
    const int64_t h = i / d_qk, j = i % d_qk;
    keys[t * a.n_h * d_qk + i] = j < a.d_n ? kv[h * (a.d_n + a.d_v) + j] : pe[j - a.d_n];
  }
}

}  // namespace

void transpose_lse_cuda_simt(int64_t T, int64_t n_h, const float* x, float* y, CudaStream stream) {
  if (T * n_h == 0) return;
  launch(transpose_kernel,
         {dim3(static_cast<unsigned>((T * n_h + kThreads - 1) / kThreads)), kThreads, 0, stream}, T,
         n_h, x, y);
}
void build_keys_cuda_simt(const spec::MlaPrefillArgs& a, void* keys, CudaStream stream) {
  const int64_t s = a.s0 + a.T;
  if (s <= 0) return;
  launch(keys_kernel, {dim3(static_cast<unsigned>(s)), kThreads, 0, stream}, a,
         static_cast<uint16_t*>(keys));
}

}  // namespace v3b::kern
