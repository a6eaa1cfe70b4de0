// SwiGLU (SPEC 1.13), with or without 1x128 FP8 quantisation. Bound by bytes: 3 T m e (2 T m e + 1.03 T m with codes
// instead of y). A thread takes 8 columns; a block of 256 takes 2048 of one row.
#include "kernels/gemm/fp8_quant_device.cuh"
#include "kernels/norm_rope/norm_rope_cuda.h"

namespace v3b::kern {
namespace {

using namespace dev;

constexpr int kThreads = 256;

// exp(-a) is capped: a very negative a gives a tiny value, not a / inf * up = NaN for up = inf.
__device__ __forceinline__ float silu(float a) { return a / (1.0f + expf(fminf(-a, 88.0f))); }

template <bool kQuant>
__global__ void __launch_bounds__(kThreads)
    swiglu_kernel(spec::SwigluArgs a, bool wide_in, bool wide_out, f8e4m3* codes, float* scales,
                  bool pow2) {
  const int64_t t = blockIdx.x;
  const int64_t j = 8 * (static_cast<int64_t>(blockIdx.y) * kThreads + threadIdx.x);
  const int64_t n = a.m - j;
  float g[8], u[8];
#pragma unroll
  for (int i = 0; i < 8; ++i) g[i] = u[i] = 0;
  if (n > 0) {
    load8(a.gate, t * a.in_stride + j, a.in_type, wide_in, n, g);
    load8(a.up, t * a.in_stride + j, a.in_type, wide_in, n, u);
  }
  const float scale = a.row_scale == nullptr ? 1.0f : a.row_scale[t];
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    g[i] = silu(g[i]) * u[i] * scale;
    if (kQuant && i >= n) g[i] = 0;  // a NaN scale or a 0 * inf must not count past the end
    if (kQuant && a.out_type == spec::DType::bf16) g[i] = as_float(round_bf16(g[i]));
  }
  if (n > 0 && (!kQuant || a.y != nullptr))
    store8(a.y, t * a.y_stride + j, a.out_type, wide_out, n, g);
  if constexpr (kQuant) quantise_act8(t, a.m, j, g, codes, scales, pow2, wide_out);
}

LaunchConfig config(const spec::SwigluArgs& a, CudaStream stream) {
  return {dim3(static_cast<unsigned>(a.T),
               static_cast<unsigned>((a.m + 8 * kThreads - 1) / (8 * kThreads))),
          kThreads, 0, stream};
}

}  // namespace

void swiglu_cuda_simt(const spec::SwigluArgs& a, CudaStream stream) {
  if (a.T == 0 || a.m == 0) return;
  launch(swiglu_kernel<false>, config(a, stream), a,
         a.in_stride % 8 == 0 && aligned16(a.gate, a.up), a.y_stride % 8 == 0 && aligned16(a.y),
         nullptr, nullptr, false);
}

void swiglu_quant_cuda_simt(const spec::SwigluArgs& a, const QuantOut& q, CudaStream stream) {
  if (a.T == 0 || a.m == 0) return;
  const bool wide_out = a.m % 8 == 0 && reinterpret_cast<uintptr_t>(q.codes) % 8 == 0 &&
                        (a.y == nullptr || (a.y_stride % 8 == 0 && aligned16(a.y)));
  launch(swiglu_kernel<true>, config(a, stream), a, a.in_stride % 8 == 0 && aligned16(a.gate, a.up),
         wide_out, q.codes, q.scales, q.act_scale == spec::ActScale::ue8m0);
}

}  // namespace v3b::kern
