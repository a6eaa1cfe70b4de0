// Few rows times a weight matrix (decode): bound by the bytes of the weights. No shared memory on the way in: a lane's
// 16-byte load of a weight row is its share of a tensor-core operand, because k may be permuted as long as both operands
// agree. The warps of a block share the columns and split k; their sums meet in shared memory in fixed order.
// At 3.35 TB/s an SM must keep about 18 KB in flight: 8 warps x 32 lanes x 16 B x kNT x 4 (bf16) is 32 KB for kNT = 2.
#pragma once
#include "kernels/gemm/mma_tile.cuh"

namespace v3b::kern::mma {

// 16 kMT rows, 8 kNT columns, kWarps slices of k. Modes as in mma_tile.cuh.
template <Mode kMode, int kMT, int kNT, int kWarps>
struct Skinny {
  using TA = ElementA<kMode>;
  using TB = ElementB<kMode>;
  static constexpr int kM = 16 * kMT, kN = 8 * kNT, kThreads = 32 * kWarps;
  static constexpr int kPitch = kN + 1;
  static constexpr int64_t kSharedBytes = int64_t{4} * kWarps * kM * kPitch;
  static constexpr int kWide = 16 / static_cast<int>(sizeof(TB));  // elements of a lane's load of B
  static constexpr int kLoads = 128 / (4 * kWide);                 // loads of a 128-long segment
  static constexpr int kMore = static_cast<int>(sizeof(TA) / sizeof(TB));  // loads of A a load of B

  // Rows lane/4 + 8 i of A, columns lane/4 + 8 j of B: pointers to k = 0 or null (zeros); scales as in Tile.
  const TA* a[2 * kMT];
  const TB* b[kNT];
  const float *sa[2 * kMT], *sb[kNT];
  int64_t K = 0;
  bool aligned_a = true, aligned_b = true;

  static __device__ __forceinline__ void words(uint32_t (&r)[4], const uint4& v) {
    r[0] = v.x, r[1] = v.y, r[2] = v.z, r[3] = v.w;
  }

  // Leaves the sums in shared memory; sum(row, column) reads them after the barrier that ends run().
  __device__ __forceinline__ void run(uint8_t* shared) const {
    const int t = lane_id() % 4, g = lane_id() / 4;
    float sums[kMT][kNT][4] = {};
#pragma unroll 1
    for (int64_t k0 = int64_t{128} * warp_id(); k0 < K; k0 += 128 * kWarps) {
      uint32_t rb[kNT][kLoads][4];
#pragma unroll
      for (int j = 0; j < kNT; ++j)
#pragma unroll
        for (int u = 0; u < kLoads; ++u) {
          const int64_t k = k0 + (4 * u + t) * kWide;
          words(rb[j][u], b[j] == nullptr || k >= K ? make_uint4(0, 0, 0, 0)
                                                    : load16(b[j] + k, K - k, aligned_b));
        }
      if constexpr (kMode == Mode::bf16) {
#pragma unroll
        for (int u = 0; u < kLoads; ++u) step(u, k0, t, rb, sums);
      } else {
        float part[kMT][kNT][4] = {};
#pragma unroll
        for (int u = 0; u < kLoads; ++u) step(u, k0, t, rb, part);
        const int64_t block = k0 / 128;
#pragma unroll
        for (int j = 0; j < kNT; ++j) {
          const float s = sb[j] == nullptr ? 0.0f : sb[j][block];
#pragma unroll
          for (int i = 0; i < kMT; ++i)
#pragma unroll
            for (int e = 0; e < 4; ++e) {
              float both = s;
              if constexpr (kMode == Mode::fp8)
                both *= sa[2 * i + e / 2] == nullptr ? 0.0f : sa[2 * i + e / 2][block];
              sums[i][j][e] += part[i][j][e] * both;
            }
        }
      }
    }
    float* out = reinterpret_cast<float*>(shared) + warp_id() * kM * kPitch;
#pragma unroll
    for (int i = 0; i < kMT; ++i)
#pragma unroll
      for (int j = 0; j < kNT; ++j)
#pragma unroll
        for (int e = 0; e < 4; ++e)
          out[(16 * i + g + 8 * (e / 2)) * kPitch + 8 * j + 2 * t + e % 2] = sums[i][j][e];
    __syncthreads();
  }
  static __device__ __forceinline__ float sum(const uint8_t* shared, int row, int column) {
    const float* p = reinterpret_cast<const float*>(shared) + row * kPitch + column;
    float s = 0;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) s += p[w * kM * kPitch];
    return s;
  }

 private:
  __device__ __forceinline__ void step(int u, int64_t k0, int t,
                                       const uint32_t (&rb)[kNT][kLoads][4],
                                       float (&to)[kMT][kNT][4]) const {
    const int64_t k = k0 + (4 * u + t) * kWide;
#pragma unroll
    for (int i = 0; i < kMT; ++i) {
      uint32_t ra[2][4 * kMore];
#pragma unroll
      for (int h = 0; h < 2; ++h)
#pragma unroll
        for (int q = 0; q < kMore; ++q) {
          const int64_t kq = k + q * (kWide / kMore);
          const TA* row = a[2 * i + h];
          const uint4 v = row == nullptr || kq >= K ? make_uint4(0, 0, 0, 0)
                                                    : load16(row + kq, K - kq, aligned_a);
          ra[h][4 * q] = v.x, ra[h][4 * q + 1] = v.y, ra[h][4 * q + 2] = v.z,
                    ra[h][4 * q + 3] = v.w;
        }
#pragma unroll
      for (int x = 0; x < 2 * kMore; ++x) {  // products of a load: 2, or 4 where B is half as wide
        const uint32_t fa[4] = {ra[0][2 * x], ra[1][2 * x], ra[0][2 * x + 1], ra[1][2 * x + 1]};
#pragma unroll
        for (int j = 0; j < kNT; ++j) {
          if constexpr (kMode == Mode::fp8) {
            mma_e4m3(to[i][j], fa, rb[j][u][2 * x], rb[j][u][2 * x + 1]);
          } else if constexpr (kMode == Mode::bf16) {
            mma_bf16(to[i][j], fa, rb[j][u][2 * x], rb[j][u][2 * x + 1]);
          } else {
            uint32_t b0, b1;
            widen_e4m3(rb[j][u][x], b0, b1);
            mma_bf16(to[i][j], fa, b0, b1);
          }
        }
      }
    }
  }
};

}  // namespace v3b::kern::mma
