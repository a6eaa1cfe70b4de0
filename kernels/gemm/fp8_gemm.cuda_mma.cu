// Block-scaled FP8 product (SPEC 1.23) on E4M3 tensor cores (mma.sync m16n8k32, sm_89 and later). Each 128-long segment
// is summed by the tensor cores from zero (Hopper keeps about 14 bits there) and promoted into fp32 as dot * (sa * sb).
// Bounds on H100: 2 m n k FLOPs at 62% of 1980 TFLOP/s, or m k + n k + 2 m n bytes and scales at 3.35 TB/s: bytes win
// below about m = 180. ptxas 13.0 makes far more code of an E4M3 mma.sync for sm_90a and sm_100 than for sm_89: it
// widens the operands to fp16 there, so half of that rate at best; the full rate needs wgmma (fp8_gemm.cuda_cutlass_sm90).
// 128x64 tiles of 8 warps, 4 stages of 128 of k (96 KiB); few tiles: 64x64; few rows: mma_skinny.cuh. Warp tiles of 32x32
// because sums, segment sums and widened operands fill the registers.
#include "kernels/gemm/gemm_cuda.h"
#include "kernels/gemm/mma_skinny.cuh"
#include "kernels/gemm/mma_tile.cuh"

namespace v3b::kern {
namespace {

using namespace mma;

struct Problem {
  int M, N;
  int64_t K, kb;  // kb: scale blocks of k
  const f8e4m3 *a, *b;
  const float *sa, *sb;
  void* c;
  bool aligned_a, aligned_b, c_bf16;
};

__device__ __forceinline__ void put(const Problem& p, int m, int n, float v) {
  const int64_t i = int64_t{m} * p.N + n;
  if (p.c_bf16)
    static_cast<bf16*>(p.c)[i] = round_bf16(v);
  else
    static_cast<float*>(p.c)[i] = v;
}

template <class T>
__global__ void __launch_bounds__(T::kThreads, T::kThreads == 128 ? 2 : 1)
    fp8_tile_kernel(const Problem p) {
  V3B_DYNAMIC_SHARED(shared);
  const int m0 = static_cast<int>(blockIdx.x) * T::kM, n0 = static_cast<int>(blockIdx.y) * T::kN;
  T tile;
  tile.K = p.K, tile.aligned_a = p.aligned_a, tile.aligned_b = p.aligned_b;
#pragma unroll
  for (int i = 0; i < T::kPassesA; ++i) {
    const int m = m0 + T::row_of_a(i);
    tile.a[i] = m < p.M ? p.a + m * p.K : nullptr;
  }
#pragma unroll
  for (int i = 0; i < T::kPassesB; ++i) {
    const int n = n0 + T::row_of_b(i);
    tile.b[i] = n < p.N ? p.b + n * p.K : nullptr;
  }
#pragma unroll
  for (int i = 0; i < 2 * T::kMI; ++i) {
    const int m = m0 + T::row_of_sum(i);
    tile.sa[i] = m < p.M ? p.sa + m * p.kb : nullptr;
  }
  tile.sb0 = tile.sb1 = p.sb + n0 / 128 * p.kb;  // a tile lies in one block of 128 columns
  typename T::Sums sums;
  tile.run(shared, sums);
  const int n1 = n0 + T::warp_column() + 2 * (lane_id() % 4);
#pragma unroll
  for (int i = 0; i < 2 * T::kMI; ++i) {
    const int m = m0 + T::row_of_sum(i);
    if (m >= p.M) continue;
#pragma unroll
    for (int j = 0; j < T::kNI; ++j) {
      const int n = n1 + 8 * j;
      const float v = sums[i / 2][j][2 * (i % 2)], w = sums[i / 2][j][2 * (i % 2) + 1];
      if (n + 1 < p.N && p.c_bf16 && (p.N & 1) == 0) {
        *reinterpret_cast<uint32_t*>(static_cast<bf16*>(p.c) + int64_t{m} * p.N + n) =
            pack_bf16(v, w);
        continue;
      }
      if (n < p.N) put(p, m, n, v);
      if (n + 1 < p.N) put(p, m, n + 1, w);
    }
  }
}

template <class S>
__global__ void __launch_bounds__(S::kThreads, S::kM == 16 ? 2 : 1)
    fp8_skinny_kernel(const Problem p) {
  V3B_DYNAMIC_SHARED(shared);
  const int m0 = static_cast<int>(blockIdx.y) * S::kM, n0 = static_cast<int>(blockIdx.x) * S::kN;
  const int g = lane_id() / 4;
  S s;
  s.K = p.K, s.aligned_a = p.aligned_a, s.aligned_b = p.aligned_b;
#pragma unroll
  for (int i = 0; i < S::kM / 8; ++i) {
    const int m = m0 + g + 8 * i;
    s.a[i] = m < p.M ? p.a + m * p.K : nullptr;
  }
  // Scales of rows: sums[i][.][e] belongs to row lane/4 + 16 i + 8 (e/2), as the operand rows.
#pragma unroll
  for (int i = 0; i < S::kM / 8; ++i) {
    const int m = m0 + g + 8 * i;
    s.sa[i] = m < p.M ? p.sa + m * p.kb : nullptr;
  }
#pragma unroll
  for (int j = 0; j < S::kN / 8; ++j) {
    const int n = n0 + g + 8 * j;
    s.b[j] = n < p.N ? p.b + n * p.K : nullptr;
    s.sb[j] = p.sb + n0 / 128 * p.kb;
  }
  s.run(shared);
  for (int i = static_cast<int>(threadIdx.x); i < S::kM * S::kN; i += S::kThreads) {
    const int r = i / S::kN, c = i % S::kN;
    if (m0 + r < p.M && n0 + c < p.N) put(p, m0 + r, n0 + c, S::sum(shared, r, c));
  }
}

using Big = Tile<Mode::fp8, 128, 64, 128, 32, 32, 4>;
using Small = Tile<Mode::fp8, 64, 64, 128, 32, 32, 4>;
using Few16 = Skinny<Mode::fp8, 1, 2, 8>;
using Few32 = Skinny<Mode::fp8, 2, 4, 8>;

unsigned blocks(int64_t n, int64_t of) { return static_cast<unsigned>((n + of - 1) / of); }

}  // namespace

void fp8_gemm_cuda_mma(const spec::Fp8GemmArgs& a, CudaStream stream) {
  if (a.m == 0 || a.n == 0) return;
  const auto aligned = [&](const void* p) {
    return reinterpret_cast<uintptr_t>(p) % 16 == 0 && a.k % 16 == 0;
  };
  const Problem p = {static_cast<int>(a.m),
                     static_cast<int>(a.n),
                     a.k,
                     spec::fp8_blocks(a.k),
                     a.qa,
                     a.qb,
                     a.sa,
                     a.sb,
                     a.c,
                     aligned(a.qa),
                     aligned(a.qb),
                     a.c_type == spec::DType::bf16};
  const int64_t small = int64_t{blocks(a.m, 64)} * blocks(a.n, 64),
                big = int64_t{blocks(a.m, 128)} * blocks(a.n, 64);
  if (a.m <= 16)
    launch(fp8_skinny_kernel<Few16>,
           {dim3(blocks(a.n, Few16::kN)), Few16::kThreads, Few16::kSharedBytes, stream}, p);
  else if (a.m <= 32 || (small < 64 && a.k >= 2048))
    launch(fp8_skinny_kernel<Few32>,
           {dim3(blocks(a.n, Few32::kN), blocks(a.m, Few32::kM)), Few32::kThreads,
            Few32::kSharedBytes, stream},
           p);
  else if (big < 120)
    launch(fp8_tile_kernel<Small>,
           {dim3(blocks(a.m, 64), blocks(a.n, 64)), Small::kThreads, Small::kSharedBytes, stream},
           p);
  else
    launch(fp8_tile_kernel<Big>,
           {dim3(blocks(a.m, Big::kM), blocks(a.n, Big::kN)), Big::kThreads, Big::kSharedBytes,
            stream},
           p);
}

}  // namespace v3b::kern
