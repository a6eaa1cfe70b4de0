// What the tensor-core attention kernels share: eight-element chunks into shared memory, fragments, row statistics.
#pragma once
#include "kernels/core/cuda_device.cuh"

namespace v3b::kern::dev {

constexpr float kLog2e = 1.44269504088896340736f;
constexpr float kLn2 = 0.693147180559945309417f;

// Elements [at, at + 8) of a row of `n` into 16 bytes of shared memory, zeros past the end; `row_valid` false: zeros,
// nothing is read. fast: rows 16-byte aligned, n a multiple of 8 (asynchronous); else by elements (at once).
__device__ __forceinline__ void load_chunk(bf16* to, const bf16* row, int at, int n, bool row_valid,
                                           bool fast) {
  if (fast) {
    const bool valid = row_valid && at < n;
    cp_async16(to, valid ? row + at : row, valid);
    return;
  }
#pragma unroll
  for (int e = 0; e < 8; ++e) to[e] = row_valid && at + e < n ? row[at + e] : bf16{0};
}
// The same of two rows one behind the other: n1 elements of row1, then n2 of row2. fast: both multiples of 8.
__device__ __forceinline__ void load_chunk2(bf16* to, const bf16* row1, int n1, const bf16* row2,
                                            int n2, int at, bool row_valid, bool fast) {
  if (fast) {
    const bool valid = row_valid && at < n1 + n2;
    const bf16* from = at < n1 ? row1 + at : row2 + (at - n1);
    cp_async16(to, valid ? from : row1, valid);
    return;
  }
#pragma unroll
  for (int e = 0; e < 8; ++e) {
    const int i = at + e;
    to[e] = row_valid && i < n1 + n2 ? (i < n1 ? row1[i] : row2[i - n1]) : bf16{0};
  }
}

__device__ __forceinline__ float quad_max(float v) {
  v = fmaxf(v, __shfl_xor_sync(kFullMask, v, 1));
  return fmaxf(v, __shfl_xor_sync(kFullMask, v, 2));
}
__device__ __forceinline__ float quad_sum(float v) {
  v += __shfl_xor_sync(kFullMask, v, 1);
  return v + __shfl_xor_sync(kFullMask, v, 2);
}
// A maximum that is -inf (nothing visible yet) is replaced, so that exp2(s - m) is 0 and not NaN.
__device__ __forceinline__ float finite_or_zero(float m) { return m == -INFINITY ? 0.0f : m; }

// Two neighbours of a row, where the second may be past the end or the pair not aligned.
__device__ __forceinline__ void store_pair(bf16* row, int at, int n, bool pairs, float x, float y) {
  if (pairs) {
    if (at < n) *reinterpret_cast<uint32_t*>(row + at) = pack_bf16(x, y);
    return;
  }
  if (at < n) row[at] = round_bf16(x);
  if (at + 1 < n) row[at + 1] = round_bf16(y);
}
__device__ __forceinline__ void store_pair(float* row, int at, int n, bool pairs, float x,
                                           float y) {
  if (pairs) {
    if (at < n) *reinterpret_cast<float2*>(row + at) = make_float2(x, y);
    return;
  }
  if (at < n) row[at] = x;
  if (at + 1 < n) row[at + 1] = y;
}

}  // namespace v3b::kern::dev
