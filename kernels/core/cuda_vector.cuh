// Rows in chunks of 8 elements: one 16-byte access for bf16, two for f32; element by element where the caller says that
// addresses are not aligned (`wide` false) or where the row ends inside of the chunk.
#pragma once
#include <cstring>

#include "kernels/core/cuda_device.cuh"

namespace v3b::kern {

// Host side of `wide`.
template <class... P>
bool aligned16(const P*... p) {
  return ((reinterpret_cast<uintptr_t>(p) % 16 == 0) && ...);
}

namespace dev {

__device__ __forceinline__ uint4 load16(const void* p) {
#if defined(V3B_CUDA_EMULATE)
  if (reinterpret_cast<uintptr_t>(p) % 16 != 0) emu::fail("a 16-byte load that is not aligned");
  uint4 v;
  std::memcpy(&v, p, 16);
  return v;
#else
  return *static_cast<const uint4*>(p);
#endif
}
__device__ __forceinline__ void store16(void* p, uint4 v) {
#if defined(V3B_CUDA_EMULATE)
  if (reinterpret_cast<uintptr_t>(p) % 16 != 0) emu::fail("a 16-byte store that is not aligned");
  std::memcpy(p, &v, 16);
#else
  *static_cast<uint4*>(p) = v;
#endif
}
__device__ __forceinline__ void store8_bytes(void* p, uint2 v) {
#if defined(V3B_CUDA_EMULATE)
  if (reinterpret_cast<uintptr_t>(p) % 8 != 0) emu::fail("an 8-byte store that is not aligned");
  std::memcpy(p, &v, 8);
#else
  *static_cast<uint2*>(p) = v;
#endif
}

// v = p[0..8), elements at and past n read as 0. wide: p is 16-byte aligned.
__device__ __forceinline__ void load8(const bf16* p, bool wide, int64_t n, float (&v)[8]) {
  if (wide && n >= 8) {
    const uint4 u = load16(p);
    v[0] = bf16_lo(u.x), v[1] = bf16_hi(u.x), v[2] = bf16_lo(u.y), v[3] = bf16_hi(u.y);
    v[4] = bf16_lo(u.z), v[5] = bf16_hi(u.z), v[6] = bf16_lo(u.w), v[7] = bf16_hi(u.w);
    return;
  }
#pragma unroll
  for (int i = 0; i < 8; ++i) v[i] = i < n ? spec::to_float(p[i]) : 0.0f;
}
__device__ __forceinline__ void load8(const float* p, bool wide, int64_t n, float (&v)[8]) {
  if (wide && n >= 8) {
    const uint4 a = load16(p), b = load16(p + 4);
    v[0] = __uint_as_float(a.x), v[1] = __uint_as_float(a.y), v[2] = __uint_as_float(a.z);
    v[3] = __uint_as_float(a.w), v[4] = __uint_as_float(b.x), v[5] = __uint_as_float(b.y);
    v[6] = __uint_as_float(b.z), v[7] = __uint_as_float(b.w);
    return;
  }
#pragma unroll
  for (int i = 0; i < 8; ++i) v[i] = i < n ? p[i] : 0.0f;
}
// The same of a tensor whose type (bf16 or f32) is known at run time; `at` in elements.
__device__ __forceinline__ void load8(const void* p, int64_t at, spec::DType t, bool wide,
                                      int64_t n, float (&v)[8]) {
  if (t == spec::DType::bf16)
    load8(static_cast<const bf16*>(p) + at, wide, n, v);
  else
    load8(static_cast<const float*>(p) + at, wide, n, v);
}
__device__ __forceinline__ void store8(bf16* p, bool wide, int64_t n, const float (&v)[8]) {
  if (wide && n >= 8) {
    store16(p, make_uint4(pack_bf16(v[0], v[1]), pack_bf16(v[2], v[3]), pack_bf16(v[4], v[5]),
                          pack_bf16(v[6], v[7])));
    return;
  }
#pragma unroll
  for (int i = 0; i < 8; ++i)
    if (i < n) p[i] = round_bf16(v[i]);
}
__device__ __forceinline__ void store8(float* p, bool wide, int64_t n, const float (&v)[8]) {
  if (wide && n >= 8) {
    store16(p, make_uint4(__float_as_uint(v[0]), __float_as_uint(v[1]), __float_as_uint(v[2]),
                          __float_as_uint(v[3])));
    store16(p + 4, make_uint4(__float_as_uint(v[4]), __float_as_uint(v[5]), __float_as_uint(v[6]),
                              __float_as_uint(v[7])));
    return;
  }
#pragma unroll
  for (int i = 0; i < 8; ++i)
    if (i < n) p[i] = v[i];
}
__device__ __forceinline__ void store8(void* p, int64_t at, spec::DType t, bool wide, int64_t n,
                                       const float (&v)[8]) {
  if (t == spec::DType::bf16)
    store8(static_cast<bf16*>(p) + at, wide, n, v);
  else
    store8(static_cast<float*>(p) + at, wide, n, v);
}

// Largest key of a warp and of a block (scratch: 33 keys of shared memory, free again after the call).
__device__ __forceinline__ uint64_t warp_max(uint64_t v) {
#pragma unroll
  for (int o = 16; o > 0; o >>= 1) {
    const uint64_t w = __shfl_xor_sync(kFullMask, v, o);
    v = w > v ? w : v;
  }
  return v;
}
__device__ __forceinline__ uint64_t block_max(uint64_t v, uint64_t* scratch) {
  v = warp_max(v);
  __syncthreads();
  if (lane_id() == 0) scratch[warp_id()] = v;
  __syncthreads();
  if (warp_id() == 0) {
    const uint64_t m =
        warp_max(lane_id() < static_cast<int>(blockDim.x) / 32 ? scratch[lane_id()] : uint64_t{0});
    if (lane_id() == 0) scratch[32] = m;
  }
  __syncthreads();
  return scratch[32];
}
// Sum over the block in a fixed order; scratch: 33 doubles.
__device__ __forceinline__ double warp_sum(double v) {
#pragma unroll
  for (int o = 16; o > 0; o >>= 1) v += __shfl_xor_sync(kFullMask, v, o);
  return v;
}
__device__ __forceinline__ double block_sum(double v, double* scratch) {
  v = warp_sum(v);
  __syncthreads();
  if (lane_id() == 0) scratch[warp_id()] = v;
  __syncthreads();
  if (warp_id() == 0) {
    const double s =
        warp_sum(lane_id() < static_cast<int>(blockDim.x) / 32 ? scratch[lane_id()] : 0.0);
    if (lane_id() == 0) scratch[32] = s;
  }
  __syncthreads();
  return scratch[32];
}

}  // namespace dev
}  // namespace v3b::kern
