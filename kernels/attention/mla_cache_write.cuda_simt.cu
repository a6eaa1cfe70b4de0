// Rows into the latent cache (SPEC 1.9), one warp a row: copies, or the 8-bit record, bit for bit what the reference
// writes. Bound by bytes: (d_c + d_r) e in, one row out; 1.8 KB (bf16 to record) or 2.3 KB a token at 512 + 64, so
// 0.6 us per 1000 tokens at 3.35 TB/s; T below about 4000 is launch latency.
#include <algorithm>

#include "kernels/attention/attention_cuda.h"
#include "kernels/attention/warp_copy.cuh"
#include "kernels/core/cuda_device.cuh"

namespace v3b::kern {
namespace {

using namespace dev;

constexpr int kThreads = 128, kRows = kThreads / 32;
constexpr int kBlocks = 8;  // an SM: without a wish ptxas aims at more, and spills
constexpr int64_t kTile = 128;

// One tile of up to 128 values, four neighbours a lane.
template <class T>
__device__ void write_tile(const T* __restrict__ c, int64_t n, bool pow2, bool words,
                           uint8_t* codes, uint8_t* scale_at) {
  const int64_t first = 4 * lane_id();
  float v[4];
  float top = 0;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    v[i] = first + i < n ? as_float(c[first + i]) : 0.0f;
    top = fmaxf(top, fabsf(v[i]));
  }
  top = warp_max(top);
  float scale = fmaxf(__fdiv_rn(top, 448.0f), 1e-4f);
  if (pow2) scale = spec::ceil_pow2(scale);
  const uint32_t lo = pack_e4m3(__fdiv_rn(v[0], scale), __fdiv_rn(v[1], scale));
  const uint32_t hi = pack_e4m3(__fdiv_rn(v[2], scale), __fdiv_rn(v[3], scale));
  const uint32_t four = lo | hi << 16;
  if (words) {
    if (first < n) *reinterpret_cast<uint32_t*>(codes + first) = four;
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i)
      if (first + i < n) codes[first + i] = static_cast<uint8_t>(four >> (8 * i));
  }
  if (lane_id() < 4)  // bytes: records of odd sizes are not aligned
    scale_at[lane_id()] = static_cast<uint8_t>(__float_as_uint(scale) >> (8 * lane_id()));
}

template <class T>
__global__ void __launch_bounds__(kThreads, kBlocks)
    mla_cache_write_kernel(spec::MlaCacheWriteArgs a) {
  const int64_t t = static_cast<int64_t>(blockIdx.x) * kRows + warp_id();
  if (t >= a.T) return;
  const int64_t slot = a.slots[t];
  if (slot < 0) return;
  const T* c = static_cast<const T*>(a.c) + t * a.c_stride;
  const T* k_pe = static_cast<const T*>(a.k_pe) + t * a.k_pe_stride;
  uint8_t* row = static_cast<uint8_t*>(a.cache) +
                 slot * spec::mla_cache_row_bytes(a.kv_format, a.dtype, a.d_c, a.d_r);
  if (a.kv_format == spec::KvFormat::bf16) {
    constexpr int64_t kBytes = sizeof(T);
    warp_copy(row, c, a.d_c * kBytes);
    warp_copy(row + a.d_c * kBytes, k_pe, a.d_r * kBytes);
    return;
  }
  const int64_t tiles = (a.d_c + kTile - 1) / kTile;
  const bool words = a.d_c % 4 == 0 && reinterpret_cast<uintptr_t>(row) % 4 == 0;
#pragma unroll 1  // five divisions a tile, each with a slow path that is a call
  for (int64_t i = 0; i < tiles; ++i)
    write_tile(c + i * kTile, min(kTile, a.d_c - i * kTile),
               a.kv_format == spec::KvFormat::fp8_656_pow2, words, row + i * kTile,
               row + a.d_c + 4 * i);
  uint8_t* rope = row + a.d_c + 4 * tiles;
  if constexpr (sizeof(T) == 2) {
    warp_copy(rope, k_pe, 2 * a.d_r);
  } else {
    for (int64_t i = lane_id(); i < a.d_r; i += 32) {
      const uint16_t bits = round_bf16(k_pe[i]).bits;
      rope[2 * i] = static_cast<uint8_t>(bits);
      rope[2 * i + 1] = static_cast<uint8_t>(bits >> 8);
    }
  }
}

}  // namespace

void mla_cache_write_cuda_simt(const spec::MlaCacheWriteArgs& a, CudaStream stream) {
  if (a.T <= 0) return;
  const LaunchConfig c{dim3(static_cast<unsigned>((a.T + kRows - 1) / kRows)), kThreads, 0, stream};
  if (a.dtype == spec::DType::bf16)
    launch(mla_cache_write_kernel<spec::bf16>, c, a);
  else
    launch(mla_cache_write_kernel<float>, c, a);
}

}  // namespace v3b::kern
