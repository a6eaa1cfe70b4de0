// RMSNorm (SPEC 1.2), with or without residual and 1x128 FP8 quantisation: one block a row, the row stays in registers
// between the sum of squares and the scaling.
// Bound by bytes: 2 d e a row (4 d e with residual, 6 counting the restore of the bench; d e + 1.03 d with codes
// instead of y). At 3.35 TB/s and d = 7168 bf16 that is 8.6 ns a row; a block needs about 2 us latency, so T of 500 and
// more keeps 132 SMs x 4 blocks busy.
#include "kernels/gemm/fp8_quant_device.cuh"
#include "kernels/norm_rope/norm_rope_cuda.h"
#include "model/error.h"

namespace v3b::kern {
namespace {

using namespace dev;

constexpr int kThreads = 256;
constexpr int kHeld =
    4;  // chunks of 8 that a thread keeps: rows up to 8192; longer ones are read again

template <class T, bool kQuant, bool kWide>
__global__ void __launch_bounds__(kThreads)
    rmsnorm_kernel(int64_t d, float eps, bool hf, const T* x, T* residual, const T* w, T* y,
                   f8e4m3* codes, float* scales, bool pow2) {
  V3B_DYNAMIC_SHARED(shared);
  float* scratch = reinterpret_cast<float*>(shared);
  const int64_t row = blockIdx.x, base = row * d;
  const int64_t warp_first = 8 * (static_cast<int64_t>(threadIdx.x) & ~int64_t{31});
  const int64_t step = 8 * kThreads;
  // Wide rows are whole chunks: no plain path is compiled into their kernel.
  const auto left = [&](int64_t j) { return kWide ? int64_t{8} : d - j; };
  const auto take = [&](int64_t j, float(&v)[8]) {  // after the residual, which is updated
    load8(x + base + j, kWide, left(j), v);
    if (residual == nullptr) return;
    float r[8];
    load8(residual + base + j, kWide, left(j), r);
#pragma unroll
    for (int i = 0; i < 8; ++i) v[i] = as_float(from_float<T>(v[i] + r[i]));
    store8(residual + base + j, kWide, left(j), v);
  };
  float held[kHeld][8];
  float sum = 0;
#pragma unroll
  for (int c = 0; c < kHeld; ++c) {
    const int64_t j = 8 * static_cast<int64_t>(threadIdx.x) + c * step;
#pragma unroll
    for (int i = 0; i < 8; ++i) held[c][i] = 0;
    if (j >= d) continue;
    take(j, held[c]);
#pragma unroll
    for (int i = 0; i < 8; ++i) sum += held[c][i] * held[c][i];
  }
  for (int64_t j = 8 * static_cast<int64_t>(threadIdx.x) + kHeld * step; j < d; j += step) {
    float v[8];
    take(j, v);
#pragma unroll
    for (int i = 0; i < 8; ++i) sum += v[i] * v[i];
  }
  const float scale = rsqrtf(block_sum(sum, scratch) / static_cast<float>(d) + eps);  // 2 ulp

  const auto finish = [&](int64_t j, float(&v)[8]) {
    if (j < d) {
      float g[8];
      load8(w + j, kWide, left(j), g);
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        v[i] *= scale;
        if (hf) v[i] = as_float(from_float<T>(v[i]));
        v[i] *= g[i];
        if constexpr (kQuant) v[i] = as_float(from_float<T>(v[i]));
      }
      if (!kQuant || y != nullptr) store8(y + base + j, kWide, left(j), v);
    }
    if constexpr (kQuant) quantise_act8(row, d, j, v, codes, scales, pow2, kWide);
  };
#pragma unroll
  for (int c = 0; c < kHeld; ++c)
    if (warp_first + c * step < d)  // whole warps: quantisation shuffles
      finish(8 * static_cast<int64_t>(threadIdx.x) + c * step, held[c]);
  for (int64_t f = warp_first + kHeld * step; f < d; f += step) {
    const int64_t j = f + 8 * lane_id();
    float v[8] = {};
    if (j < d) load8((residual != nullptr ? residual : x) + base + j, kWide, left(j), v);
    finish(j, v);
  }
}

template <class T, bool kQuant>
void run(const spec::RmsNormArgs& a, const QuantOut& q, CudaStream stream) {
  const bool wide = a.d % 8 == 0 && aligned16(a.x, a.residual, a.w, a.y) &&
                    reinterpret_cast<uintptr_t>(q.codes) % 8 == 0;
  launch(wide ? rmsnorm_kernel<T, kQuant, true> : rmsnorm_kernel<T, kQuant, false>,
         {dim3(static_cast<unsigned>(a.T)), kThreads, 34 * 4, stream}, a.d,
         static_cast<float>(a.eps), a.norm_rounding == spec::NormRounding::hf,
         static_cast<const T*>(a.x), static_cast<T*>(a.residual), static_cast<const T*>(a.w),
         static_cast<T*>(a.y), q.codes, q.scales, q.act_scale == spec::ActScale::ue8m0);
}

}  // namespace

void rmsnorm_cuda_simt(const spec::RmsNormArgs& a, CudaStream stream) {
  if (a.T == 0) return;
  if (a.dtype == spec::DType::bf16)
    run<spec::bf16, false>(a, {}, stream);
  else
    run<float, false>(a, {}, stream);
}

void rmsnorm_quant_cuda_simt(const spec::RmsNormArgs& a, const QuantOut& q, CudaStream stream) {
  if (a.dtype != spec::DType::bf16)
    throw Error(ExitCode::usage, "RMSNorm with quantisation has no such dtype", "rmsnorm_quant",
                "bf16", spec::dtype_name(a.dtype));
  if (a.T == 0) return;
  run<spec::bf16, true>(a, q, stream);
}

}  // namespace v3b::kern
