// RMSNorm (SPEC 1.2): one block a row, the row stays in registers between the sum of squares and the scaling.
// Bound by bytes: 2 d e a row (4 d e with residual, 6 counting the restore of the bench). At 3.35 TB/s and d = 7168 bf16
// that is 8.6 ns a row; a block needs about 2 us latency, so T of 500 and more keeps 132 SMs x 4 blocks busy.
#include "kernels/core/cuda_device.cuh"
#include "kernels/norm_rope/norm_rope_cuda.h"

namespace v3b::kern {
namespace {

using namespace dev;

constexpr int kThreads = 256;
constexpr int kHeld = 32;  // elements a thread keeps: rows up to 8192; longer ones are read again

template <class T>
__global__ void __launch_bounds__(kThreads)
    rmsnorm_kernel(int64_t d, float eps, bool hf, const T* __restrict__ x, T* __restrict__ residual,
                   const T* __restrict__ w, T* __restrict__ y) {
  V3B_DYNAMIC_SHARED(shared);
  float* scratch = reinterpret_cast<float*>(shared);
  const int64_t base = static_cast<int64_t>(blockIdx.x) * d;
  float held[kHeld];
  float sum = 0;
#pragma unroll
  for (int i = 0; i < kHeld; ++i) {
    const int64_t j = threadIdx.x + static_cast<int64_t>(i) * kThreads;
    held[i] = 0;
    if (j >= d) continue;
    float v = as_float(x[base + j]);
    if (residual != nullptr) {
      const T r = from_float<T>(v + as_float(residual[base + j]));
      residual[base + j] = r;
      v = as_float(r);
    }
    held[i] = v;
    sum += v * v;
  }
  for (int64_t j = threadIdx.x + static_cast<int64_t>(kHeld) * kThreads; j < d; j += kThreads) {
    float v = as_float(x[base + j]);
    if (residual != nullptr) {
      const T r = from_float<T>(v + as_float(residual[base + j]));
      residual[base + j] = r;
      v = as_float(r);
    }
    sum += v * v;
  }
  const float scale = 1.0f / sqrtf(block_sum(sum, scratch) / static_cast<float>(d) + eps);
#pragma unroll
  for (int i = 0; i < kHeld; ++i) {
    const int64_t j = threadIdx.x + static_cast<int64_t>(i) * kThreads;
    if (j >= d) continue;
    float v = held[i] * scale;
    if (hf) v = as_float(from_float<T>(v));
    y[base + j] = from_float<T>(v * as_float(w[j]));
  }
  for (int64_t j = threadIdx.x + static_cast<int64_t>(kHeld) * kThreads; j < d; j += kThreads) {
    float v = as_float(residual != nullptr ? residual[base + j] : x[base + j]) * scale;
    if (hf) v = as_float(from_float<T>(v));
    y[base + j] = from_float<T>(v * as_float(w[j]));
  }
}

template <class T>
void run(const spec::RmsNormArgs& a, CudaStream stream) {
  launch(rmsnorm_kernel<T>, {dim3(static_cast<unsigned>(a.T)), kThreads, 34 * 4, stream}, a.d,
         static_cast<float>(a.eps), a.norm_rounding == spec::NormRounding::hf,
         static_cast<const T*>(a.x), static_cast<T*>(a.residual), static_cast<const T*>(a.w),
         static_cast<T*>(a.y));
}

}  // namespace

void rmsnorm_cuda_simt(const spec::RmsNormArgs& a, CudaStream stream) {
  if (a.T == 0) return;
  if (a.dtype == spec::DType::bf16)
    run<spec::bf16>(a, stream);
  else
    run<float>(a, stream);
}

}  // namespace v3b::kern
