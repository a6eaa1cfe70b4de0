// Softmax rows with log-sum-exp. Bound by bytes: 8 T n, which a row kept in registers reaches (n up to 1024, one warp a
// row). Longer rows: blocks of kPart columns leave (max, sum), then read their part again, from L2 as long as the rows
// in flight fit there (64 rows of 129280 are 33 MB), 12 T n bytes at worst.
#include "kernels/core/cuda_vector.cuh"
#include "kernels/norm_rope/norm_rope_cuda.h"

namespace v3b::kern {
namespace {

using namespace dev;

constexpr int kThreads = 256;
constexpr int64_t kWarpRow = 1024;
constexpr int64_t kPart = 8192;  // columns of one block: 32 a thread

struct MaxSum {
  float max, sum;  // of exp(z - max)
};
// -inf contributes nothing, whatever the maximum; NaN stays.
__device__ __forceinline__ float term(float z, float max) {
  return z == -INFINITY ? 0.0f : expf(z - max);
}
__device__ __forceinline__ MaxSum merge(MaxSum a, MaxSum b) {
  const float m = fmaxf(a.max, b.max);
  // A NaN sum may come with max = -inf: it must not be dropped.
  const float x = a.max == -INFINITY ? a.sum : a.sum * expf(a.max - m);
  const float y = b.max == -INFINITY ? b.sum : b.sum * expf(b.max - m);
  return {m, x + y};
}
// (max, sum) of the warp, from each lane's; the order of the sum is fixed.
__device__ __forceinline__ MaxSum warp_merge(MaxSum v) {
  const float m = warp_max(v.max);
  const float mine = v.max == -INFINITY ? v.sum : v.sum * expf(v.max - m);
  return {m, warp_sum(mine)};
}

__global__ void __launch_bounds__(kThreads) softmax_warp_kernel(spec::SoftmaxArgs a, float scale) {
  const int64_t t = static_cast<int64_t>(blockIdx.x) * (kThreads / 32) + warp_id();
  if (t >= a.T) return;  // whole warps; no barrier below
  constexpr int kHeld = kWarpRow / 32;
  float z[kHeld];
  float m = -INFINITY;
#pragma unroll
  for (int i = 0; i < kHeld; ++i) {
    const int64_t j = lane_id() + 32 * i;
    z[i] = j < a.n ? scale * a.x[t * a.x_stride + j] : -INFINITY;
    m = fmaxf(m, z[i]);
  }
  m = warp_max(m);
  float s = 0;
#pragma unroll
  for (int i = 0; i < kHeld; ++i) s += z[i] = term(z[i], m);
  s = warp_sum(s);
  if (a.lse != nullptr && lane_id() == 0) a.lse[t] = m + logf(s);
  if (a.y == nullptr) return;
  const float inverse = 1.0f / s;
#pragma unroll
  for (int i = 0; i < kHeld; ++i) {
    const int64_t j = lane_id() + 32 * i;
    if (j < a.n) a.y[t * a.y_stride + j] = z[i] * inverse;
  }
}

// Part blockIdx.y of row blockIdx.x.
__global__ void __launch_bounds__(kThreads)
    softmax_part_kernel(spec::SoftmaxArgs a, float scale, bool wide, MaxSum* parts) {
  V3B_DYNAMIC_SHARED(shared);
  float* scratch = reinterpret_cast<float*>(shared);
  const int64_t t = blockIdx.x, end = min(a.n, (static_cast<int64_t>(blockIdx.y) + 1) * kPart);
  constexpr int kChunks = kPart / (8 * kThreads);
  float z[kChunks][8];
  float m = -INFINITY;
#pragma unroll
  for (int c = 0; c < kChunks; ++c) {
    const int64_t j = blockIdx.y * kPart + 8 * (static_cast<int64_t>(threadIdx.x) + c * kThreads);
    load8(a.x + t * a.x_stride + j, wide, end - j, z[c]);
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      z[c][i] = j + i < end ? scale * z[c][i] : -INFINITY;
      m = fmaxf(m, z[c][i]);
    }
  }
  m = block_max(m, scratch);
  float s = 0;
#pragma unroll
  for (int c = 0; c < kChunks; ++c)
#pragma unroll
    for (int i = 0; i < 8; ++i) s += term(z[c][i], m);
  s = block_sum(s, scratch);
  if (threadIdx.x == 0) parts[t * gridDim.y + blockIdx.y] = {m, s};
}

__global__ void __launch_bounds__(kThreads)
    softmax_write_kernel(spec::SoftmaxArgs a, float scale, bool wide, const MaxSum* parts,
                         int count) {
  const int64_t t = blockIdx.x;
  MaxSum v = {-INFINITY, 0.0f};  // every warp merges all parts of the row
  for (int p = lane_id(); p < count; p += 32) v = merge(v, parts[t * count + p]);
  v = warp_merge(v);
  if (a.lse != nullptr && blockIdx.y == 0 && threadIdx.x == 0) a.lse[t] = v.max + logf(v.sum);
  if (a.y == nullptr) return;
  const int64_t end = min(a.n, (static_cast<int64_t>(blockIdx.y) + 1) * kPart);
  const float inverse = 1.0f / v.sum;
  for (int64_t j = blockIdx.y * kPart + 8 * static_cast<int64_t>(threadIdx.x); j < end;
       j += 8 * kThreads) {
    float z[8];
    load8(a.x + t * a.x_stride + j, wide, end - j, z);
#pragma unroll
    for (int i = 0; i < 8; ++i) z[i] = term(scale * z[i], v.max) * inverse;
    store8(a.y + t * a.y_stride + j, wide, end - j, z);
  }
}

int64_t parts_of(const spec::SoftmaxArgs& a) { return (a.n + kPart - 1) / kPart; }

}  // namespace

int64_t softmax_cuda_scratch_bytes(const spec::SoftmaxArgs& a) {
  return a.n <= kWarpRow ? 0 : a.T * parts_of(a) * static_cast<int64_t>(sizeof(MaxSum));
}

void softmax_cuda_simt(const spec::SoftmaxArgs& a, void* scratch, CudaStream stream) {
  if (a.T == 0 || a.n == 0) return;
  const float scale = static_cast<float>(a.scale);
  if (a.n <= kWarpRow) {
    const int64_t rows = kThreads / 32;
    launch(softmax_warp_kernel,
           {dim3(static_cast<unsigned>((a.T + rows - 1) / rows)), kThreads, 0, stream}, a, scale);
    return;
  }
  const bool wide = a.x_stride % 4 == 0 && a.y_stride % 4 == 0 && aligned16(a.x, a.y);
  const unsigned parts = static_cast<unsigned>(parts_of(a));
  const dim3 grid(static_cast<unsigned>(a.T), parts);
  launch(softmax_part_kernel, {grid, kThreads, 34 * 4, stream}, a, scale, wide,
         static_cast<MaxSum*>(scratch));
  const dim3 write_grid(grid.x, a.y == nullptr ? 1 : parts);
  launch(softmax_write_kernel, {write_grid, kThreads, 0, stream}, a, scale, wide,
         static_cast<const MaxSum*>(scratch), static_cast<int>(parts));
}

}  // namespace v3b::kern
