// Dense bf16 products on tensor cores (mma.sync, sm_80 and later), y = x W^T.
// Bounds on H100: 2 m n k FLOPs at 62% of 990 TFLOP/s (what mma.sync reaches of wgmma's rate), or (m k + n k) 2 bytes
// + m n e at 3.35 TB/s: bytes win below about m = 180. Few rows, or too few tiles to fill the device: mma_skinny.cuh,
// 16 or 32 columns a block, k split over its warps. Else 64x64 tiles while they are few, then 128x128 (4 warps of
// 64x64: 4 KB of shared memory for 64K products, below the limit of 128 B a clock).
#include "kernels/gemm/gemm_cuda.h"
#include "kernels/gemm/mma_skinny.cuh"
#include "kernels/gemm/mma_tile.cuh"

namespace v3b::kern {
namespace {

using namespace mma;

struct Problem {
  int M, N;
  int64_t K;
  const bf16 *a, *b;
  void* c;
  int64_t lda, ldb, ldc, stride_a, stride_b, stride_c;  // strides of the batch (grid.z)
  bool aligned_a, aligned_b, c_bf16, accumulate;
};

__device__ __forceinline__ void put(const Problem& p, int64_t i, float v) {
  if (p.c_bf16) {
    bf16* c = static_cast<bf16*>(p.c) + i;
    *c = round_bf16(p.accumulate ? v + as_float(*c) : v);
  } else {
    float* c = static_cast<float*>(p.c) + i;
    *c = p.accumulate ? v + *c : v;
  }
}
// Two neighbouring columns; both exist and the pair is aligned in the common case.
__device__ __forceinline__ void put2(const Problem& p, int64_t i, bool second, float v, float w) {
  if (second && !p.accumulate && (i & 1) == 0) {
    if (p.c_bf16)
      *reinterpret_cast<uint32_t*>(static_cast<bf16*>(p.c) + i) = pack_bf16(v, w);
    else
      *reinterpret_cast<float2*>(static_cast<float*>(p.c) + i) = make_float2(v, w);
    return;
  }
  put(p, i, v);
  if (second) put(p, i + 1, w);
}

template <class T>
__global__ void __launch_bounds__(T::kThreads) gemm_tile_kernel(const Problem p) {
  V3B_DYNAMIC_SHARED(shared);
  const int m0 = static_cast<int>(blockIdx.x) * T::kM, n0 = static_cast<int>(blockIdx.y) * T::kN;
  const int64_t z = blockIdx.z;
  T tile;
  tile.K = p.K, tile.aligned_a = p.aligned_a, tile.aligned_b = p.aligned_b;
#pragma unroll
  for (int i = 0; i < T::kPassesA; ++i) {
    const int m = m0 + T::row_of_a(i);
    tile.a[i] = m < p.M ? p.a + z * p.stride_a + m * p.lda : nullptr;
  }
#pragma unroll
  for (int i = 0; i < T::kPassesB; ++i) {
    const int n = n0 + T::row_of_b(i);
    tile.b[i] = n < p.N ? p.b + z * p.stride_b + n * p.ldb : nullptr;
  }
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
      if (n < p.N)
        put2(p, z * p.stride_c + m * p.ldc + n, n + 1 < p.N, sums[i / 2][j][2 * (i % 2)],
             sums[i / 2][j][2 * (i % 2) + 1]);
    }
  }
}

template <class S>
__global__ void __launch_bounds__(S::kThreads, S::kM == 16 ? 2 : 1)
    gemm_skinny_kernel(const Problem p) {
  V3B_DYNAMIC_SHARED(shared);
  const int m0 = static_cast<int>(blockIdx.y) * S::kM, n0 = static_cast<int>(blockIdx.x) * S::kN;
  const int64_t z = blockIdx.z;
  const int g = lane_id() / 4;
  S s;
  s.K = p.K, s.aligned_a = p.aligned_a, s.aligned_b = p.aligned_b;
#pragma unroll
  for (int i = 0; i < S::kM / 8; ++i) {
    const int m = m0 + g + 8 * i;
    s.a[i] = m < p.M ? p.a + z * p.stride_a + m * p.lda : nullptr;
  }
#pragma unroll
  for (int j = 0; j < S::kN / 8; ++j) {
    const int n = n0 + g + 8 * j;
    s.b[j] = n < p.N ? p.b + z * p.stride_b + n * p.ldb : nullptr;
  }
  s.run(shared);
  for (int i = static_cast<int>(threadIdx.x); i < S::kM * S::kN; i += S::kThreads) {
    const int r = i / S::kN, c = i % S::kN;
    if (m0 + r < p.M && n0 + c < p.N)
      put(p, z * p.stride_c + (m0 + r) * p.ldc + n0 + c, S::sum(shared, r, c));
  }
}

using Big = Tile<Mode::bf16, 128, 128, 32, 64, 64, 4>;
using Small = Tile<Mode::bf16, 64, 64, 64, 32, 32, 4>;
using Few16 = Skinny<Mode::bf16, 1, 2, 8>;
using Few32 = Skinny<Mode::bf16, 2, 4, 8>;

unsigned blocks(int64_t n, int64_t of) { return static_cast<unsigned>((n + of - 1) / of); }
bool aligned16(const void* p, int64_t ld, int64_t stride) {
  return reinterpret_cast<uintptr_t>(p) % 16 == 0 && ld % 8 == 0 && stride % 8 == 0;
}

}  // namespace

void gemm_batched_cuda_mma(const GemmArgs& g, int64_t count, int64_t stride_a, int64_t stride_b,
                           int64_t stride_c, CudaStream stream) {
  if (g.M == 0 || g.N == 0 || count == 0) return;
  if (g.ab_type != spec::DType::bf16 || g.trans_a || !g.trans_b) {
    for (int64_t i = 0; i < count; ++i) {
      GemmArgs one = g;
      const int64_t e = spec::dtype_bytes(g.ab_type);
      one.a = static_cast<const char*>(g.a) + i * stride_a * e;
      one.b = static_cast<const char*>(g.b) + i * stride_b * e;
      one.c = static_cast<char*>(g.c) + i * stride_c * spec::dtype_bytes(g.c_type);
      gemm_cuda_simt(one, stream);
    }
    return;
  }
  const Problem p = {static_cast<int>(g.M),
                     static_cast<int>(g.N),
                     g.K,
                     static_cast<const bf16*>(g.a),
                     static_cast<const bf16*>(g.b),
                     g.c,
                     g.lda,
                     g.ldb,
                     g.ldc,
                     stride_a,
                     stride_b,
                     stride_c,
                     aligned16(g.a, g.lda, stride_a),
                     aligned16(g.b, g.ldb, stride_b),
                     g.c_type == spec::DType::bf16,
                     g.accumulate};
  const unsigned z = static_cast<unsigned>(count);
  const int64_t small = int64_t{blocks(g.M, 64)} * blocks(g.N, 64) * count,
                big = int64_t{blocks(g.M, 128)} * blocks(g.N, 128) * count;
  if (g.M <= 16) {
    launch(gemm_skinny_kernel<Few16>,
           {dim3(blocks(g.N, Few16::kN), 1, z), Few16::kThreads, Few16::kSharedBytes, stream}, p);
  } else if (g.M <= 32 || (small < 64 && g.K >= 1024)) {
    launch(gemm_skinny_kernel<Few32>,
           {dim3(blocks(g.N, Few32::kN), blocks(g.M, Few32::kM), z), Few32::kThreads,
            Few32::kSharedBytes, stream},
           p);
  } else if (big < 200) {
    launch(
        gemm_tile_kernel<Small>,
        {dim3(blocks(g.M, 64), blocks(g.N, 64), z), Small::kThreads, Small::kSharedBytes, stream},
        p);
  } else {
    launch(gemm_tile_kernel<Big>,
           {dim3(blocks(g.M, 128), blocks(g.N, 128), z), Big::kThreads, Big::kSharedBytes, stream},
           p);
  }
}

void gemm_cuda_mma(const GemmArgs& g, CudaStream stream) {
  gemm_batched_cuda_mma(g, 1, 0, 0, 0, stream);
}

}  // namespace v3b::kern
