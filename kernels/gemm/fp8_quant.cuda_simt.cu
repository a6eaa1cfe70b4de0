// FP8 quantisation (SPEC 1.22). Bound by bytes: (e + 1) a element and the scales; x stays in registers between the
// maximum and the codes. Activations: 16 lanes a 1x128 block; weights: one block of threads a 128x128 block.
#include "kernels/gemm/fp8_quant_device.cuh"
#include "kernels/gemm/rows_cuda.h"

namespace v3b::kern {
namespace {

using namespace dev;

constexpr int kThreads = 256;

template <class T>
__global__ void __launch_bounds__(kThreads)
    act_kernel(spec::Fp8QuantArgs a, bool wide_in, bool wide_out) {
  const int64_t row = blockIdx.x;
  const int64_t j = 8 * (static_cast<int64_t>(blockIdx.y) * kThreads + threadIdx.x);
  float v[8];
  load8(static_cast<const T*>(a.x) + row * a.cols + j, wide_in, a.cols - j, v);
  quantise_act8(row, a.cols, j, v, a.codes, a.scales, a.act_scale == spec::ActScale::ue8m0,
                wide_out);
}

template <class T, bool kWide>
__global__ void __launch_bounds__(kThreads) weight_kernel(spec::Fp8QuantArgs a) {
  V3B_DYNAMIC_SHARED(shared);
  constexpr int kRows = 128 / (kThreads / 16);  // of a thread
  const int64_t row0 = static_cast<int64_t>(blockIdx.y) * 128 + threadIdx.x / 16;
  const int64_t col = static_cast<int64_t>(blockIdx.x) * 128 + 8 * (threadIdx.x % 16);
  float v[kRows][8];
  float m = 0;
#pragma unroll
  for (int i = 0; i < kRows; ++i) {
    const int64_t row = row0 + i * (kThreads / 16);
    const int64_t n = row < a.rows ? a.cols - col : 0;
    if (kWide && n <= 0) {
#pragma unroll
      for (int k = 0; k < 8; ++k) v[i][k] = 0;
    } else {
      load8(static_cast<const T*>(a.x) + row * a.cols + col, kWide, kWide ? 8 : n, v[i]);
    }
    m = fmaxf(m, amax8(v[i]));
  }
  const float s = weight_scale(block_max(m, reinterpret_cast<float*>(shared)));
#pragma unroll
  for (int i = 0; i < kRows; ++i) {
    const int64_t row = row0 + i * (kThreads / 16);
    if (row < a.rows && col < a.cols)
      store_codes8(a.codes + row * a.cols + col, kWide, kWide ? 8 : a.cols - col, v[i], s);
  }
  if (threadIdx.x == 0) a.scales[static_cast<int64_t>(blockIdx.y) * gridDim.x + blockIdx.x] = s;
}

template <class T>
void run(const spec::Fp8QuantArgs& a, CudaStream stream) {
  const bool wide_in = a.cols % 8 == 0 && aligned16(a.x);
  const bool wide_out = a.cols % 8 == 0 && reinterpret_cast<uintptr_t>(a.codes) % 8 == 0;
  if (a.weight) {
    const dim3 grid(static_cast<unsigned>(spec::fp8_blocks(a.cols)),
                    static_cast<unsigned>(spec::fp8_blocks(a.rows)));
    launch(wide_in && wide_out ? weight_kernel<T, true> : weight_kernel<T, false>,
           {grid, kThreads, 34 * 4, stream}, a);
  } else {
    const dim3 grid(static_cast<unsigned>(a.rows),
                    static_cast<unsigned>((a.cols + 8 * kThreads - 1) / (8 * kThreads)));
    launch(act_kernel<T>, {grid, kThreads, 0, stream}, a, wide_in, wide_out);
  }
}

}  // namespace

void fp8_quant_cuda_simt(const spec::Fp8QuantArgs& a, CudaStream stream) {
  if (a.rows == 0 || a.cols == 0) return;
  if (a.dtype == spec::DType::bf16)
    run<spec::bf16>(a, stream);
  else
    run<float>(a, stream);
}

}  // namespace v3b::kern
