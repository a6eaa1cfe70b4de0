// Grouped expert products on tensor cores; kernels/gemm's tiles with rows found by moe_groups.cuh.
// Bounds on H100: 6 d m FLOPs a row at 62% of 990 TFLOP/s, or the weights of the chosen experts once: 88 MB (bf16) or
// 44 MB (FP8) an expert of V3 at 3.35 TB/s = 26 or 13 us. Bytes win below about 180 rows an expert: decode streams
// weights (16 rows: mma_skinny.cuh, 16 weight rows a block), prefill uses 64 x 128 tiles with 3 stages in flight.
// gate and up: a warp's lower half of columns is gate, its upper half the same columns of up, so that both sums of an
// element meet in one thread and only hidden is stored.
#pragma once
#include "kernels/gemm/mma_skinny.cuh"
#include "kernels/gemm/mma_tile.cuh"
#include "kernels/moe/moe_experts_cuda.h"
#include "kernels/moe/moe_groups.cuh"

namespace v3b::kern::moe_mma {

using namespace mma;

template <class TA>
struct Rows {  // operand A of a product: rows with gather and scales
  const TA* x;
  const float* scale;
  const int32_t* source;
  int64_t K, kb;
  __device__ __forceinline__ int64_t at(int64_t row) const {
    return source == nullptr ? row : static_cast<int64_t>(source[row]);
  }
};
// Weight rows of one tile: column c of gate/up or of down, pointer to k = 0 and its scales.
template <class TB>
struct Weights {
  const TB *w0, *w1;  // gate and up, or down twice
  const float *scale0, *scale1;
  int64_t columns, K, kb;
  __device__ __forceinline__ const TB* row(int which, int64_t c) const {
    return c < columns ? (which == 0 ? w0 : w1) + c * K : nullptr;
  }
  __device__ __forceinline__ const float* scales(int which, int64_t c) const {
    const float* s = which == 0 ? scale0 : scale1;
    return s == nullptr || c >= columns ? nullptr : s + c / 128 * kb;
  }
  __device__ __forceinline__ bool aligned() const {
    constexpr int64_t kN = 16 / static_cast<int64_t>(sizeof(TB));
    return K % kN == 0 &&
           ((reinterpret_cast<uintptr_t>(w0) | reinterpret_cast<uintptr_t>(w1)) & 15u) == 0;
  }
};
template <class TB, bool kGateUp>
__device__ __forceinline__ Weights<TB> weights_of(const MoeFfnArgs& a, int expert) {
  const spec::FfnPointers& f = a.experts[expert];
  Weights<TB> w;
  w.columns = kGateUp ? a.m : a.d;
  w.K = kGateUp ? a.d : a.m;
  w.kb = (w.K + 127) / 128;
  w.w0 = static_cast<const TB*>(kGateUp ? f.gate : f.down);
  w.w1 = static_cast<const TB*>(kGateUp ? f.up : f.down);
  w.scale0 = kGateUp ? f.gate_scale : f.down_scale;
  w.scale1 = kGateUp ? f.up_scale : f.down_scale;
  return w;
}
template <class TA, bool kGateUp>
__device__ __forceinline__ Rows<TA> rows_of(const MoeFfnArgs& a) {
  constexpr bool kFp8 = std::is_same_v<TA, f8e4m3>;
  Rows<TA> r;
  r.K = kGateUp ? a.d : a.m;
  r.kb = (r.K + 127) / 128;
  if constexpr (kGateUp)
    r.x = static_cast<const TA*>(a.x), r.scale = a.x_scale, r.source = a.source;
  else if constexpr (kFp8)
    r.x = a.hidden_codes, r.scale = a.hidden_scale, r.source = nullptr;
  else
    r.x = static_cast<const TA*>(a.hidden), r.scale = nullptr, r.source = nullptr;
  return r;
}
template <class TA>
__device__ __forceinline__ bool aligned_rows(const Rows<TA>& r) {
  return r.K % (16 / static_cast<int64_t>(sizeof(TA))) == 0 &&
         (reinterpret_cast<uintptr_t>(r.x) & 15u) == 0;
}

// For sm_100 ptxas by itself aims at more blocks an SM than shared memory holds, and spills.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
#define V3B_TILE_BOUNDS(threads) __launch_bounds__(threads, (threads) >= 256 ? 1 : 3)
#else
#define V3B_TILE_BOUNDS(threads) __launch_bounds__(threads)
#endif

template <class T, bool kGateUp>
__global__ void V3B_TILE_BOUNDS(T::kThreads) ffn_tile_kernel(const MoeFfnArgs a) {
  V3B_DYNAMIC_SHARED(shared);
  using TA = typename T::TA;
  using TB = typename T::TB;
  const GroupTile at = find_tile<T::kM>(a.groups, blockIdx.x);
  if (at.expert < 0) return;                          // the whole block
  constexpr int kSpan = kGateUp ? T::kN / 2 : T::kN;  // columns of the result
  constexpr int kHalf = T::kWN / 2;
  const int64_t n0 = int64_t{blockIdx.y} * kSpan;
  const Rows<TA> x = rows_of<TA, kGateUp>(a);
  const Weights<TB> w = weights_of<TB, kGateUp>(a, at.expert);
  T tile;
  tile.K = x.K, tile.aligned_a = aligned_rows(x), tile.aligned_b = w.aligned();
#pragma unroll
  for (int i = 0; i < T::kPassesA; ++i) {
    const int r = T::row_of_a(i);
    tile.a[i] = r < at.rows ? x.x + x.at(at.row + r) * x.K : nullptr;
  }
#pragma unroll
  for (int i = 0; i < T::kPassesB; ++i) {
    const int r = T::row_of_b(i), j = r % T::kWN;
    tile.b[i] = kGateUp ? w.row(j / kHalf, n0 + r / T::kWN * kHalf + j % kHalf) : w.row(0, n0 + r);
  }
  tile.sb0 = w.scales(0, n0), tile.sb1 = w.scales(1, n0);
  if constexpr (std::is_same_v<TA, f8e4m3>) {
#pragma unroll
    for (int i = 0; i < 2 * T::kMI; ++i) {
      const int r = T::row_of_sum(i);
      tile.sa[i] = r < at.rows ? x.scale + x.at(at.row + r) * x.kb : nullptr;
    }
  }
  typename T::Sums sums;
  tile.run(shared, sums);
  const int64_t columns = w.columns;
  const int64_t n1 = n0 + (kGateUp ? T::warp_column() / 2 : T::warp_column()) + 2 * (lane_id() % 4);
#pragma unroll
  for (int i = 0; i < 2 * T::kMI; ++i) {
    const int r = T::row_of_sum(i);
    if (r >= at.rows) continue;
#pragma unroll
    for (int j = 0; j < (kGateUp ? T::kNI / 2 : T::kNI); ++j) {
      const int64_t n = n1 + 8 * j, to = (at.row + r) * columns + n;
      float v[2];
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        v[e] = sums[i / 2][j][2 * (i % 2) + e];
        if constexpr (kGateUp)
          v[e] = silu_times(v[e], sums[i / 2][j + T::kNI / 2][2 * (i % 2) + e]);
      }
      if constexpr (kGateUp) {
        bf16* h = static_cast<bf16*>(a.hidden) + to;
        if (n + 1 < columns && (columns & 1) == 0) {
          *reinterpret_cast<uint32_t*>(h) = pack_bf16(v[0], v[1]);
        } else {
          if (n < columns) h[0] = round_bf16(v[0]);
          if (n + 1 < columns) h[1] = round_bf16(v[1]);
        }
      } else {
        if (n + 1 < columns && (columns & 1) == 0) {
          *reinterpret_cast<float2*>(a.out + to) = make_float2(v[0], v[1]);
        } else {
          if (n < columns) a.out[to] = v[0];
          if (n + 1 < columns) a.out[to + 1] = v[1];
        }
      }
    }
  }
}

template <class S, bool kGateUp>
__global__ void __launch_bounds__(S::kThreads, 2) ffn_skinny_kernel(const MoeFfnArgs a) {
  V3B_DYNAMIC_SHARED(shared);
  using TA = typename S::TA;
  using TB = typename S::TB;
  const GroupTile at = find_tile<S::kM>(a.groups, blockIdx.x);
  if (at.expert < 0) return;  // the whole block
  constexpr int kSpan = kGateUp ? S::kN / 2 : S::kN;
  const int64_t n0 = int64_t{blockIdx.y} * kSpan;
  const int g = lane_id() / 4;
  const Rows<TA> x = rows_of<TA, kGateUp>(a);
  const Weights<TB> w = weights_of<TB, kGateUp>(a, at.expert);
  S s;
  s.K = x.K, s.aligned_a = aligned_rows(x), s.aligned_b = w.aligned();
#pragma unroll
  for (int i = 0; i < S::kM / 8; ++i) {
    const int r = g + 8 * i;
    const int64_t from = r < at.rows ? x.at(at.row + r) : 0;
    s.a[i] = r < at.rows ? x.x + from * x.K : nullptr;
    s.sa[i] = r < at.rows && x.scale != nullptr ? x.scale + from * x.kb : nullptr;
  }
#pragma unroll
  for (int j = 0; j < S::kN / 8; ++j) {
    const int which = kGateUp ? j / (S::kN / 16) : 0;
    const int64_t c0 = n0 + 8 * (kGateUp ? j % (S::kN / 16) : j);
    s.b[j] = w.row(which, c0 + g);
    s.sb[j] = w.scales(which, c0);
  }
  s.run(shared);
  for (int i = static_cast<int>(threadIdx.x); i < S::kM * kSpan; i += S::kThreads) {
    const int r = i / kSpan, c = i % kSpan;
    if (r >= at.rows || n0 + c >= w.columns) continue;
    const int64_t to = (at.row + r) * w.columns + n0 + c;
    const float v = S::sum(shared, r, c);
    if constexpr (kGateUp)
      static_cast<bf16*>(a.hidden)[to] = round_bf16(silu_times(v, S::sum(shared, r, kSpan + c)));
    else
      a.out[to] = v;
  }
}

template <bool kGateUp, class T, class S>
void launch_product(const MoeFfnArgs& a, CudaStream stream) {
  const int64_t columns = kGateUp ? a.m : a.d;
  const auto grid = [&](int64_t kM, int64_t span) {
    return dim3(static_cast<unsigned>(tile_bound(a.groups, kM)),
                static_cast<unsigned>((columns + span - 1) / span));
  };
  if (rows_bound(a.groups) <= S::kM)
    launch(ffn_skinny_kernel<S, kGateUp>,
           {grid(S::kM, kGateUp ? S::kN / 2 : S::kN), S::kThreads, S::kSharedBytes, stream}, a);
  else
    launch(ffn_tile_kernel<T, kGateUp>,
           {grid(T::kM, kGateUp ? T::kN / 2 : T::kN), T::kThreads, T::kSharedBytes, stream}, a);
}

}  // namespace v3b::kern::moe_mma
