// Block scales brought into a library's layout: see fp8_scales_cuda.h.
#include "kernels/core/cuda_device.cuh"
#include "kernels/gemm/fp8_scales_cuda.h"

namespace v3b::kern {
namespace {

constexpr int kThreads = 256;

__global__ void __launch_bounds__(kThreads) scales_kernel(Fp8ScalesArgs a) {
  int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (i < a.kb * a.padded_m) {
    const int64_t row = i % a.padded_m, b = i / a.padded_m;
    a.to_a[i] = row < a.m ? a.sa[row * a.kb + b] : 0.0f;
    return;
  }
  i -= a.kb * a.padded_m;
  if (a.to_b == nullptr) return;
  if (a.b_transposed) {
    if (i < a.kb * a.nb) a.to_b[i] = a.sb[i % a.nb * a.kb + i / a.nb];
  } else if (i < a.nb * a.b_stride) {
    const int64_t row = i / a.b_stride, b = i % a.b_stride;
    a.to_b[i] = b < a.kb ? a.sb[row * a.kb + b] : 0.0f;
  }
}

}  // namespace

void fp8_scales_cuda_simt(const Fp8ScalesArgs& a, CudaStream stream) {
  const int64_t n =
      a.kb * a.padded_m + (a.to_b == nullptr ? 0 : a.nb * (a.b_transposed ? a.kb : a.b_stride));
  if (n == 0) return;
  launch(scales_kernel,
         {dim3(static_cast<unsigned>((n + kThreads - 1) / kThreads)), kThreads, 0, stream}, a);
}

}  // namespace v3b::kern
