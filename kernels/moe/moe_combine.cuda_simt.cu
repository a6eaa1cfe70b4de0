// Weighted sum of the experts' rows (SPEC 1.14): K rows in, one out, in registers, k ascending. Bound by bytes:
// T d e (K + 1). A thread takes 8 columns, a block of 256 takes 2048 of one token.
#include "kernels/core/cuda_vector.cuh"
#include "kernels/moe/moe_cuda.h"

namespace v3b::kern {
namespace {

using namespace dev;

constexpr int kThreads = 256;

template <class T>
__global__ void __launch_bounds__(kThreads) combine_kernel(spec::MoeCombineArgs a, bool wide) {
  const int64_t t = blockIdx.x;
  const int64_t j = 8 * (static_cast<int64_t>(blockIdx.y) * kThreads + threadIdx.x);
  if (j >= a.d) return;
  float sum[8];
#pragma unroll
  for (int i = 0; i < 8; ++i) sum[i] = 0;
#pragma unroll 4
  for (int64_t k = 0; k < a.K; ++k) {
    const int64_t row = a.row[t * a.K + k];
    if (row < 0) continue;
    const float w = a.weight[t * a.K + k];
    float v[8];
    load8(static_cast<const T*>(a.rows) + row * a.d + j, wide, a.d - j, v);
#pragma unroll
    for (int i = 0; i < 8; ++i) sum[i] = __fmaf_rn(w, v[i], sum[i]);
  }
  store8(static_cast<T*>(a.y) + t * a.d + j, wide, a.d - j, sum);
}

// MoeAccum::bf16: rows in ascending order, every value, product and partial sum rounded to bf16.
template <class T>
__global__ void __launch_bounds__(kThreads) combine_bf16_kernel(spec::MoeCombineArgs a, bool wide) {
  const int64_t t = blockIdx.x;
  const int64_t j = 8 * (static_cast<int64_t>(blockIdx.y) * kThreads + threadIdx.x);
  if (j >= a.d) return;
  float sum[8];
#pragma unroll
  for (int i = 0; i < 8; ++i) sum[i] = 0;
  int64_t last = -1;
  for (;;) {
    int64_t row = -1, slot = 0;  // the smallest one past `last`
    for (int64_t k = 0; k < a.K; ++k) {
      const int64_t r = a.row[t * a.K + k];
      if (r > last && (row < 0 || r < row)) row = r, slot = k;
    }
    if (row < 0) break;
    last = row;
    const float w = a.weight[t * a.K + slot];
    float v[8];
    load8(static_cast<const T*>(a.rows) + row * a.d + j, wide, a.d - j, v);
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const float product = as_float(round_bf16(__fmul_rn(w, as_float(round_bf16(v[i])))));
      sum[i] = as_float(round_bf16(__fadd_rn(sum[i], product)));
    }
  }
  store8(static_cast<T*>(a.y) + t * a.d + j, wide, a.d - j, sum);
}

}  // namespace

void moe_combine_cuda_simt(const spec::MoeCombineArgs& a, CudaStream stream) {
  if (a.T == 0 || a.d == 0) return;
  const bool wide = a.d % 8 == 0 && aligned16(a.rows, a.y);
  const LaunchConfig config = {
      dim3(static_cast<unsigned>(a.T),
           static_cast<unsigned>((a.d + 8 * kThreads - 1) / (8 * kThreads))),
      kThreads, 0, stream};
  const bool bf16 = a.dtype == spec::DType::bf16;
  if (a.moe_accum == spec::MoeAccum::bf16)
    launch(bf16 ? combine_bf16_kernel<spec::bf16> : combine_bf16_kernel<float>, config, a, wide);
  else if (bf16)
    launch(combine_kernel<spec::bf16>, config, a, wide);
  else
    launch(combine_kernel<float>, config, a, wide);
}

}  // namespace v3b::kern
