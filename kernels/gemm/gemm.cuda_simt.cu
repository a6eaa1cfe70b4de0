// Dense products without tensor cores: fp32 FMA, any transposition, f32 or bf16 operands (SPEC 0.1).
// Bounds on H100: 2 m n k FLOPs at 67 TFLOP/s fp32, (m k + n k) e + m n e bytes at 3.35 TB/s. 64x64 tiles, 256 threads
// with 4x4 sums each: shared memory gives 8 floats for 16 FMA, about half of the fp32 rate. Up to 8 rows with B [N, K]:
// one warp a column streams the weights.
#include "kernels/core/cuda_device.cuh"
#include "kernels/gemm/gemm_cuda.h"

namespace v3b::kern {
namespace {

using namespace dev;

constexpr int kTile = 64, kStep = 16, kThreads = 256, kFew = 8;

struct Problem {
  int64_t M, N, K;
  const void *a, *b;
  void* c;
  int64_t a_row, a_k, b_row, b_k, ldc;  // strides of A by (m, k), of B by (n, k)
  bool c_bf16, accumulate;
};

__device__ __forceinline__ void put(const Problem& p, int64_t m, int64_t n, float v) {
  const int64_t i = m * p.ldc + n;
  if (p.c_bf16) {
    bf16* c = static_cast<bf16*>(p.c) + i;
    *c = round_bf16(p.accumulate ? v + as_float(*c) : v);
  } else {
    float* c = static_cast<float*>(p.c) + i;
    *c = p.accumulate ? v + *c : v;
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads) gemm_tile_kernel(const Problem p) {
  V3B_DYNAMIC_SHARED(shared);
  float* sA = reinterpret_cast<float*>(shared);  // [kStep][kTile + 4]
  float* sB = sA + kStep * (kTile + 4);
  const int64_t m0 = int64_t{blockIdx.x} * kTile, n0 = int64_t{blockIdx.y} * kTile;
  const int t = static_cast<int>(threadIdx.x), ty = t / 16, tx = t % 16;
  const T *a = static_cast<const T*>(p.a), *b = static_cast<const T*>(p.b);
  float sums[4][4] = {};
  const auto fill = [&](float* s, const T* x, int64_t row0, int64_t rows, int64_t by_row,
                        int64_t by_k, int64_t k0) {
#pragma unroll
    for (int i = 0; i < kTile * kStep / kThreads; ++i) {
      const int e = t + i * kThreads;  // neighbours in memory to neighbouring threads
      const int r = by_k == 1 ? e / kStep : e % kTile, k = by_k == 1 ? e % kStep : e / kTile;
      const bool in = row0 + r < rows && k0 + k < p.K;
      s[k * (kTile + 4) + r] = in ? as_float(x[(row0 + r) * by_row + (k0 + k) * by_k]) : 0.0f;
    }
  };
  for (int64_t k0 = 0; k0 < p.K; k0 += kStep) {
    fill(sA, a, m0, p.M, p.a_row, p.a_k, k0);
    fill(sB, b, n0, p.N, p.b_row, p.b_k, k0);
    __syncthreads();
#pragma unroll
    for (int k = 0; k < kStep; ++k) {
      float x[4], y[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        x[i] = sA[k * (kTile + 4) + 4 * ty + i];
        y[i] = sB[k * (kTile + 4) + 4 * tx + i];
      }
#pragma unroll
      for (int i = 0; i < 4; ++i)
#pragma unroll
        for (int j = 0; j < 4; ++j) sums[i][j] += x[i] * y[j];
    }
    __syncthreads();
  }
#pragma unroll
  for (int i = 0; i < 4; ++i)
#pragma unroll
    for (int j = 0; j < 4; ++j)
      if (m0 + 4 * ty + i < p.M && n0 + 4 * tx + j < p.N)
        put(p, m0 + 4 * ty + i, n0 + 4 * tx + j, sums[i][j]);
}

template <class T>
__global__ void __launch_bounds__(kThreads) gemm_rows_kernel(const Problem p) {
  const int64_t n = int64_t{blockIdx.x} * (kThreads / 32) + warp_id();
  if (n >= p.N) return;  // whole warps; no barrier follows
  const T *a = static_cast<const T*>(p.a), *b = static_cast<const T*>(p.b) + n * p.b_row;
  float sums[kFew] = {};
#pragma unroll 4
  for (int64_t k = lane_id(); k < p.K; k += 32) {
    const float y = as_float(b[k]);
#pragma unroll
    for (int m = 0; m < kFew; ++m)
      if (m < p.M) sums[m] += as_float(a[m * p.a_row + k * p.a_k]) * y;
  }
#pragma unroll
  for (int m = 0; m < kFew; ++m) {
    const float v = warp_sum(sums[m]);
    if (m < p.M && lane_id() == 0) put(p, m, n, v);
  }
}

template <class T>
void run(const Problem& p, CudaStream stream) {
  const auto blocks = [](int64_t n, int64_t of) {
    return static_cast<unsigned>((n + of - 1) / of);
  };
  if (p.M <= kFew && p.b_k == 1)
    launch(gemm_rows_kernel<T>, {dim3(blocks(p.N, kThreads / 32)), kThreads, 0, stream}, p);
  else
    launch(gemm_tile_kernel<T>,
           {dim3(blocks(p.M, kTile), blocks(p.N, kTile)), kThreads, 2 * 4 * kStep * (kTile + 4),
            stream},
           p);
}

}  // namespace

void gemm_cuda_simt(const GemmArgs& g, CudaStream stream) {
  if (g.M == 0 || g.N == 0) return;
  const Problem p = {g.M,
                     g.N,
                     g.K,
                     g.a,
                     g.b,
                     g.c,
                     g.trans_a ? 1 : g.lda,
                     g.trans_a ? g.lda : 1,
                     g.trans_b ? g.ldb : 1,
                     g.trans_b ? 1 : g.ldb,
                     g.ldc,
                     g.c_type == spec::DType::bf16,
                     g.accumulate};
  if (g.ab_type == spec::DType::bf16)
    run<bf16>(p, stream);
  else
    run<float>(p, stream);
}

}  // namespace v3b::kern
