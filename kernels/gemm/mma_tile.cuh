// C tile = A tile B tile^T on tensor cores: cp.async pipeline into swizzled shared memory, ldmatrix, mma.sync. Shared by
// gemm, fp8_gemm and the grouped expert products; a kernel says where rows come from and what happens to the sums.
//   bf16: bf16 x bf16.   w8: bf16 x E4M3 weights with 128x128 scales (exact in bf16).   fp8: E4M3 x E4M3, SPEC 1.23.
#pragma once
#include "kernels/core/cuda_device.cuh"

namespace v3b::kern::mma {

using namespace dev;

enum class Mode { bf16, w8, fp8 };
template <Mode kMode>
using ElementA = std::conditional_t<kMode == Mode::fp8, f8e4m3, bf16>;
template <Mode kMode>
using ElementB = std::conditional_t<kMode == Mode::bf16, bf16, f8e4m3>;

// 16 bytes of a row of which `left` elements exist; zeros beyond. aligned: p is 16-byte aligned.
template <class T>
__device__ __forceinline__ uint4 load16(const T* p, int64_t left, bool aligned) {
  constexpr int kN = 16 / static_cast<int>(sizeof(T)), kBits = 8 * static_cast<int>(sizeof(T));
  if (aligned && left >= kN) return *reinterpret_cast<const uint4*>(p);
  uint64_t lo = 0, hi = 0;
#pragma unroll 1
  for (int i = 0; i < kN && i < left; ++i) {
    const uint64_t v = static_cast<uint64_t>(p[i].bits);
    if (i < kN / 2)
      lo |= v << (kBits * i);
    else
      hi |= v << (kBits * (i - kN / 2));
  }
  return make_uint4(static_cast<unsigned>(lo), static_cast<unsigned>(lo >> 32),
                    static_cast<unsigned>(hi), static_cast<unsigned>(hi >> 32));
}

// Four E4M3 codes to two registers of bf16 pairs (exact).
__device__ __forceinline__ void widen_e4m3(uint32_t four, uint32_t& b0, uint32_t& b1) {
  const float2 lo = unpack_e4m3(static_cast<uint16_t>(four & 0xffffu));
  const float2 hi = unpack_e4m3(static_cast<uint16_t>(four >> 16));
  b0 = pack_bf16(lo.x, lo.y);
  b1 = pack_bf16(hi.x, hi.y);
}

// Block tile BM x BN, BK elements of k a stage (128 for w8 and fp8: one scale block), warp tile WM x WN.
template <Mode kMode, int BM, int BN, int BK, int WM, int WN, int kStages>
struct Tile {
  using TA = ElementA<kMode>;
  using TB = ElementB<kMode>;
  static constexpr int kM = BM, kN = BN, kWM = WM, kWN = WN;
  static constexpr int kWarpsN = BN / WN, kThreads = 32 * (BM / WM) * kWarpsN;
  static constexpr int kMI = WM / 16, kNI = WN / 8;
  static constexpr int kRowA = BK * static_cast<int>(sizeof(TA)),
                       kRowB = BK * static_cast<int>(sizeof(TB));
  static constexpr int kStage = BM * kRowA + BN * kRowB;
  static constexpr int64_t kSharedBytes = int64_t{kStages} * kStage;
  static constexpr int kPassA = kThreads / (kRowA / 16), kPassB = kThreads / (kRowB / 16);
  static constexpr int kPassesA = BM / kPassA, kPassesB = BN / kPassB;
  static_assert(kMode == Mode::bf16 || BK == 128);
  static_assert(BM % kPassA == 0 && BN % kPassB == 0 && kNI % 2 == 0);
  using Sums = float[kMI][kNI][4];

  // Byte offset of 16-byte chunk c of a row: chunks of neighbouring rows lie in different banks.
  template <int kRow, bool kPairs>
  static __device__ __forceinline__ int at(int row, int c) {
    if constexpr (kPairs) return row * kRow + 16 * (c ^ (2 * (row & 3)));  // read as 32-byte pairs
    if constexpr (kRow >= 128) return row * kRow + 16 * (c ^ (row & 7));
    return row * kRow + 16 * (c ^ ((row >> 1) & 3));
  }
  static __device__ __forceinline__ int at_a(int row, int c) {
    return at<kRowA, kMode == Mode::w8>(row, c);
  }
  static __device__ __forceinline__ int at_b(int row, int c) { return at<kRowB, false>(row, c); }

  // Rows: pointers to k = 0 or null (zeros). Scales of the thread's rows of A: row pointers [ceil(K/128)] (fp8), of the
  // columns: sb0 for the lower half of the warp's columns, sb1 for the upper (w8, fp8).
  const TA* a[kPassesA];
  const TB* b[kPassesB];
  const float *sa[2 * kMI], *sb0 = nullptr, *sb1 = nullptr;
  int64_t K = 0;
  bool aligned_a = true, aligned_b = true;

  static __device__ __forceinline__ int warp_row() { return warp_id() / kWarpsN * WM; }
  static __device__ __forceinline__ int warp_column() { return warp_id() % kWarpsN * WN; }
  static __device__ __forceinline__ int row_of_a(int pass) {
    return static_cast<int>(threadIdx.x) / (kRowA / 16) + pass * kPassA;
  }
  static __device__ __forceinline__ int row_of_b(int pass) {
    return static_cast<int>(threadIdx.x) / (kRowB / 16) + pass * kPassB;
  }
  // Row of the tile behind sa[i] and sums [i/2][.][2(i%2)].
  static __device__ __forceinline__ int row_of_sum(int i) {
    return warp_row() + i / 2 * 16 + i % 2 * 8 + lane_id() / 4;
  }

  __device__ __forceinline__ void load(uint8_t* stage, int64_t k0) const {
    const int ca = static_cast<int>(threadIdx.x) % (kRowA / 16),
              cb = static_cast<int>(threadIdx.x) % (kRowB / 16);
    const int64_t ka = k0 + ca * (16 / static_cast<int>(sizeof(TA))),
                  kb = k0 + cb * (16 / static_cast<int>(sizeof(TB)));
    uint8_t* s = stage;
#pragma unroll
    for (int p = 0; p < kPassesA; ++p) copy(s + at_a(row_of_a(p), ca), a[p], ka, aligned_a);
    s += BM * kRowA;
#pragma unroll
    for (int p = 0; p < kPassesB; ++p) copy(s + at_b(row_of_b(p), cb), b[p], kb, aligned_b);
  }
  template <class T>
  __device__ __forceinline__ void copy(uint8_t* to, const T* row, int64_t k, bool aligned) const {
    const int64_t left = row == nullptr ? 0 : K - k;
    if (left <= 0 || (aligned && left >= 16 / static_cast<int>(sizeof(T))))
      cp_async16(to, left > 0 ? static_cast<const void*>(row + k) : to, left > 0);
    else
      *reinterpret_cast<uint4*>(to) = load16(row + k, left, false);
  }

  __device__ __forceinline__ void run(uint8_t* shared, Sums& sums) const {
    const int tiles = static_cast<int>((K + BK - 1) / BK);
#pragma unroll
    for (int i = 0; i < kMI; ++i)
#pragma unroll
      for (int j = 0; j < kNI; ++j)
#pragma unroll
        for (int e = 0; e < 4; ++e) sums[i][j][e] = 0;
#pragma unroll
    for (int s = 0; s < kStages - 1; ++s) {
      if (s < tiles) load(shared + s * kStage, int64_t{s} * BK);
      cp_async_commit();
    }
    int use = 0, fill = kStages - 1;
#pragma unroll 1
    for (int t = 0; t < tiles; ++t) {
      cp_async_wait<kStages - 2>();
      __syncthreads();  // stage `use` is complete, everybody is done with stage `fill`
      if (t + kStages - 1 < tiles) load(shared + fill * kStage, int64_t{t + kStages - 1} * BK);
      cp_async_commit();
      const uint8_t* sA = shared + use * kStage;
      if constexpr (kMode == Mode::bf16)
        step_bf16(sA, sA + BM * kRowA, sums);
      else if constexpr (kMode == Mode::fp8)
        step_fp8(sA, sA + BM * kRowA, t, sums);
      else
        step_w8(sA, sA + BM * kRowA, t, sums);
      use = use + 1 == kStages ? 0 : use + 1;
      fill = fill + 1 == kStages ? 0 : fill + 1;
    }
    cp_async_wait<0>();
  }

 private:
  // 32 bytes of k: one mma of bf16 or of E4M3.
  static __device__ __forceinline__ void fragment_a(uint32_t (&r)[4], const uint8_t* s, int i,
                                                    int kk) {
    const int l = lane_id();
    ldmatrix_x4(r, s + at_a(warp_row() + 16 * i + l % 16, 2 * kk + l / 16));
  }
  static __device__ __forceinline__ void fragment_b(uint32_t (&r)[4], const uint8_t* s, int j2,
                                                    int kk) {  // columns 16 j2 ..
    const int l = lane_id();
    ldmatrix_x4(r, s + at_b(warp_column() + 16 * j2 + l % 8 + 8 * (l / 16), 2 * kk + (l / 8) % 2));
  }
  // d += A B^T over kSteps steps of 32 bytes along k.
  template <int kSteps, bool kE4m3>
  static __device__ __forceinline__ void products(const uint8_t* sA, const uint8_t* sB, Sums& d) {
#pragma unroll
    for (int kk = 0; kk < kSteps; ++kk) {
      uint32_t ra[kMI][4];
#pragma unroll
      for (int i = 0; i < kMI; ++i) fragment_a(ra[i], sA, i, kk);
#pragma unroll
      for (int j = 0; j < kNI; j += 2) {
        uint32_t rb[4];
        fragment_b(rb, sB, j / 2, kk);
#pragma unroll
        for (int i = 0; i < kMI; ++i) {
          if constexpr (kE4m3) {
            mma_e4m3(d[i][j], ra[i], rb[0], rb[1]);
            mma_e4m3(d[i][j + 1], ra[i], rb[2], rb[3]);
          } else {
            mma_bf16(d[i][j], ra[i], rb[0], rb[1]);
            mma_bf16(d[i][j + 1], ra[i], rb[2], rb[3]);
          }
        }
      }
    }
  }
  __device__ __forceinline__ void step_bf16(const uint8_t* sA, const uint8_t* sB,
                                            Sums& sums) const {
    products<BK / 16, false>(sA, sB, sums);
  }
  __device__ __forceinline__ void step_fp8(const uint8_t* sA, const uint8_t* sB, int block,
                                           Sums& sums) const {
    float f[2 * kMI];
#pragma unroll
    for (int i = 0; i < 2 * kMI; ++i) f[i] = sa[i] == nullptr ? 0.0f : sa[i][block];
    const float s0 = sb0 == nullptr ? 0.0f : sb0[block], s1 = sb1 == nullptr ? 0.0f : sb1[block];
    float part[kMI][kNI][4] = {};  // the segment's sums
    products<4, true>(sA, sB, part);
#pragma unroll
    for (int i = 0; i < kMI; ++i)
#pragma unroll
      for (int j = 0; j < kNI; ++j)
#pragma unroll
        for (int e = 0; e < 4; ++e)
          sums[i][j][e] += part[i][j][e] * (f[2 * i + e / 2] * (2 * j < kNI ? s0 : s1));
  }
  // One mma takes k = 16 kk + {4t .. 4t+3} of lane t where the layout says {2t, 2t+1, 2t+8, 2t+9}: a permutation of k,
  // the same for both operands, that makes the four codes of a lane neighbours.
  __device__ __forceinline__ void step_w8(const uint8_t* sA, const uint8_t* sB, int block,
                                          Sums& sums) const {
    const int l = lane_id(), g = l / 4, t = l % 4;
    const float s0 = sb0 == nullptr ? 0.0f : sb0[block], s1 = sb1 == nullptr ? 0.0f : sb1[block];
    float part[kMI][kNI][4] = {};
#pragma unroll
    for (int kk = 0; kk < 8; kk += 2) {
      uint32_t ra[2][kMI][4];
#pragma unroll
      for (int h = 0; h < 2; ++h)
#pragma unroll
        for (int i = 0; i < kMI; ++i) {
          const int row = warp_row() + 16 * i + g, c = 2 * (kk + h) + t / 2;
          const uint2 top = *reinterpret_cast<const uint2*>(sA + at_a(row, c) + 8 * (t % 2));
          const uint2 low = *reinterpret_cast<const uint2*>(sA + at_a(row + 8, c) + 8 * (t % 2));
          ra[h][i][0] = top.x, ra[h][i][1] = low.x, ra[h][i][2] = top.y, ra[h][i][3] = low.y;
        }
#pragma unroll
      for (int j = 0; j < kNI; j += 2) {
        uint32_t codes[4];
        ldmatrix_x4(codes,
                    sB + at_b(warp_column() + 8 * j + l % 8 + 8 * (l / 16), kk + (l / 8) % 2));
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          uint32_t b0, b1, b2, b3;
          widen_e4m3(codes[h], b0, b1);
          widen_e4m3(codes[h + 2], b2, b3);
#pragma unroll
          for (int i = 0; i < kMI; ++i) {
            mma_bf16(part[i][j], ra[h][i], b0, b1);
            mma_bf16(part[i][j + 1], ra[h][i], b2, b3);
          }
        }
      }
    }
#pragma unroll
    for (int i = 0; i < kMI; ++i)
#pragma unroll
      for (int j = 0; j < kNI; ++j)
#pragma unroll
        for (int e = 0; e < 4; ++e) sums[i][j][e] += part[i][j][e] * (2 * j < kNI ? s0 : s1);
  }
};

}  // namespace v3b::kern::mma
