// 1x128 FP8 quantisation of values in registers (SPEC 1.22): 16 neighbouring lanes hold one block, 8 values each.
// Divisions are IEEE ones: codes and scales have the reference's bits.
#pragma once
#include "kernels/core/cuda_vector.cuh"
#include "reference/spec/fp8_quant.h"

namespace v3b::kern::dev {

__device__ __forceinline__ float amax8(const float (&v)[8]) {
  float m = 0;
#pragma unroll
  for (int i = 0; i < 8; ++i) m = fmaxf(m, fabsf(v[i]));  // NaN does not count, as on the CPU
  return m;
}
// Of the 16 lanes that share a block; the whole warp calls it.
__device__ __forceinline__ float half_warp_max(float m) {
#pragma unroll
  for (int o = 8; o > 0; o >>= 1) m = fmaxf(m, __shfl_xor_sync(kFullMask, m, o));
  return m;
}
__device__ __forceinline__ float act_scale(float amax, bool pow2) {
  const float s = __fdiv_rn(fmaxf(amax, 1e-4f), 448.0f);
  return pow2 ? spec::ceil_pow2(s) : s;
}
__device__ __forceinline__ float weight_scale(float amax) {
  return amax > 0 ? __fdiv_rn(amax, 448.0f) : 1.0f;
}
// Codes of v[0..n) to p; wide: p is 8-byte aligned.
__device__ __forceinline__ void store_codes8(f8e4m3* p, bool wide, int64_t n, const float (&v)[8],
                                             float s) {
  uint32_t u[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) u[i] = pack_e4m3(__fdiv_rn(v[2 * i], s), __fdiv_rn(v[2 * i + 1], s));
  if (wide && n >= 8) {
    store8_bytes(p, make_uint2(u[0] | u[1] << 16, u[2] | u[3] << 16));
    return;
  }
#pragma unroll
  for (int i = 0; i < 8; ++i)
    if (i < n) p[i] = f8e4m3{static_cast<uint8_t>(u[i / 2] >> (8 * (i % 2)))};
}
// One 1x128 block of a row [cols]: this lane holds columns at .. at+7. Every lane of the warp calls it; lanes past the
// row's end hold zeros and write nothing.
__device__ __forceinline__ void quantise_act8(int64_t row, int64_t cols, int64_t at,
                                              const float (&v)[8], f8e4m3* codes, float* scales,
                                              bool pow2, bool wide) {
  const float s = act_scale(half_warp_max(amax8(v)), pow2);
  if (at >= cols) return;
  store_codes8(codes + row * cols + at, wide, cols - at, v, s);
  if (at % spec::kFp8Block == 0) scales[row * spec::fp8_blocks(cols) + at / spec::kFp8Block] = s;
}

}  // namespace v3b::kern::dev
