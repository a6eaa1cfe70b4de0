// Small kernels of the CUDA forward pass (forward_glue_cuda.h). All bound by bytes or by launch latency (about 2 us);
// inside the decode graph only the latter counts.
#include "kernels/core/cuda_device.cuh"
#include "kernels/forward/forward_glue_cuda.h"

namespace v3b::kern {
namespace {

using namespace dev;
using spec::DType;

constexpr int kThreads = 256;

unsigned blocks_for(int64_t n) {  // grid-stride loops: at most 64 blocks an SM's worth
  const int64_t b = (n + kThreads - 1) / kThreads;
  return static_cast<unsigned>(b < 1 ? 1 : b > 8192 ? 8192 : b);
}

__global__ void __launch_bounds__(kThreads) norm_kernel(RmsNormMixedArgs a) {
  V3B_DYNAMIC_SHARED(shared);
  float* scratch = reinterpret_cast<float*>(shared);
  const int64_t x0 = static_cast<int64_t>(blockIdx.x) * a.x_stride,
                y0 = static_cast<int64_t>(blockIdx.x) * a.y_stride;
  float sum = 0;
  for (int64_t j = threadIdx.x; j < a.d; j += kThreads) {
    const float v = load_as_float(a.x, x0 + j, a.x_type);
    sum += v * v;
  }
  const float scale =
      1.0f / sqrtf(block_sum(sum, scratch) / static_cast<float>(a.d) + static_cast<float>(a.eps));
  for (int64_t j = threadIdx.x; j < a.d; j += kThreads) {
    float v = load_as_float(a.x, x0 + j, a.x_type) * scale;
    if (a.norm_rounding == spec::NormRounding::hf) v = spec::to_float(round_bf16(v));
    store_from_float(a.y, y0 + j, a.y_type, v * load_as_float(a.w, j, a.w_type));
  }
}

__global__ void __launch_bounds__(kThreads)
    embed_kernel(int64_t T, int64_t d, int64_t V, const int32_t* ids, const void* table,
                 DType dtype, float* h) {
  for (int64_t i = blockIdx.x * static_cast<int64_t>(kThreads) + threadIdx.x; i < T * d;
       i += static_cast<int64_t>(gridDim.x) * kThreads) {
    const int64_t id = ids[i / d];
    h[i] = id >= 0 && id < V ? load_as_float(table, id * d + i % d, dtype)
                             : __uint_as_float(0x7fc00000u);
  }
}

__global__ void __launch_bounds__(kThreads)
    copy_kernel(int64_t rows, int64_t n, const void* x, DType x_type, int64_t x_stride, void* y,
                DType y_type, int64_t y_stride) {
  for (int64_t i = blockIdx.x * static_cast<int64_t>(kThreads) + threadIdx.x; i < rows * n;
       i += static_cast<int64_t>(gridDim.x) * kThreads)
    store_from_float(y, i / n * y_stride + i % n, y_type,
                     load_as_float(x, i / n * x_stride + i % n, x_type));
}

__global__ void __launch_bounds__(kThreads)
    add_kernel(int64_t n, float* h, const void* y, DType y_type) {
  for (int64_t i = blockIdx.x * static_cast<int64_t>(kThreads) + threadIdx.x; i < n;
       i += static_cast<int64_t>(gridDim.x) * kThreads)
    h[i] += load_as_float(y, i, y_type);
}

__device__ __forceinline__ int slot_of(const int32_t* table, int64_t row, int64_t page) {
  return static_cast<int>(table[row / page] * page + row % page);
}

// One thread a sequence: B is at most a few hundred.
__global__ void __launch_bounds__(32) begin_kernel(DecodeState s) {
  const int64_t b = blockIdx.x * 32 + threadIdx.x;
  if (b >= s.B) return;
  for (int64_t i = 0; i < s.s_q; ++i) {
    const int64_t row = s.length[b] + i;
    s.positions[b * s.s_q + i] = static_cast<int32_t>(row);
    s.slots[b * s.s_q + i] = slot_of(s.tables + b * s.max_blocks, row, s.page);
  }
  s.seqlens[b] = s.length[b] + static_cast<int32_t>(s.s_q);
}

__global__ void __launch_bounds__(32) accept_kernel(DecodeState s) {
  const int64_t b = blockIdx.x * 32 + threadIdx.x;
  if (b >= s.B) return;
  const int32_t* choice = s.argmax + b * s.s_q;
  if (s.emitted[b] >= s.max_tokens) {  // done: the same step again and again, while others go on
    s.accepted[b] = -1;
    return;
  }
  const int32_t* fed = s.ids + b * s.s_q;
  int accepted = 0;
  while (accepted + 1 < s.s_q && fed[accepted + 1] == choice[accepted]) ++accepted;
  for (int i = 0; i <= accepted; ++i)
    if (s.emitted[b] < s.max_tokens) s.tokens[b * s.max_tokens + s.emitted[b]++] = choice[i];
  s.accepted[b] = accepted;
  s.length[b] += 1 + accepted;
  atomicAdd(&s.stats[0], 1);
  atomicAdd(&s.stats[1], static_cast<int>(s.s_q) - 1);
  atomicAdd(&s.stats[2], accepted);
  if (s.s_q == 1) {
    s.ids[b] = choice[0];
    return;
  }
  for (int64_t i = 0; i < s.s_q; ++i) {
    const int64_t row = s.mtp_length[b] + i;
    s.next_ids[b * s.s_q + i] = choice[i];
    s.mtp_positions[b * s.s_q + i] = static_cast<int32_t>(row);
    s.mtp_slots[b * s.s_q + i] = slot_of(s.mtp_tables + b * s.max_blocks, row, s.page);
  }
  // Rows past `accepted` are computed and written too: the next step overwrites them. Leaving them out would leave NaN
  // in the cache where a masked weight of zero meets it.
  s.mtp_seqlens[b] = s.mtp_length[b] + static_cast<int32_t>(s.s_q);
}

__global__ void __launch_bounds__(32) draft_kernel(DecodeState s) {
  const int64_t b = blockIdx.x * 32 + threadIdx.x;
  if (b >= s.B) return;
  const int a = s.accepted[b];
  if (a < 0) return;
  s.mtp_length[b] += 1 + a;
  s.ids[b * s.s_q] = s.argmax[b * s.s_q + a];
  for (int64_t i = 1; i < s.s_q; ++i) s.ids[b * s.s_q + i] = s.mtp_argmax[b * s.s_q + a];
}

unsigned warps_for(int64_t B) { return static_cast<unsigned>((B + 31) / 32); }

}  // namespace

void rmsnorm_mixed_cuda_simt(const RmsNormMixedArgs& a, CudaStream stream) {
  if (a.T == 0) return;
  launch(norm_kernel, {dim3(static_cast<unsigned>(a.T)), kThreads, 34 * 4, stream}, a);
}
void embed_f32_cuda_simt(int64_t T, int64_t d, int64_t V, const int32_t* ids, const void* table,
                         DType dtype, float* h, CudaStream stream) {
  launch(embed_kernel, {dim3(blocks_for(T * d)), kThreads, 0, stream}, T, d, V, ids, table, dtype,
         h);
}
void copy_rows_cuda_simt(int64_t rows, int64_t n, const void* x, DType x_type, int64_t x_stride,
                         void* y, DType y_type, int64_t y_stride, CudaStream stream) {
  if (rows * n == 0) return;
  launch(copy_kernel, {dim3(blocks_for(rows * n)), kThreads, 0, stream}, rows, n, x, x_type,
         x_stride, y, y_type, y_stride);
}
void add_rows_cuda_simt(int64_t n, float* h, const void* y, DType y_type, CudaStream stream) {
  launch(add_kernel, {dim3(blocks_for(n)), kThreads, 0, stream}, n, h, y, y_type);
}
void decode_begin_cuda_simt(const DecodeState& s, CudaStream stream) {
  launch(begin_kernel, {dim3(warps_for(s.B)), 32, 0, stream}, s);
}
void decode_accept_cuda_simt(const DecodeState& s, CudaStream stream) {
  launch(accept_kernel, {dim3(warps_for(s.B)), 32, 0, stream}, s);
}
void decode_draft_cuda_simt(const DecodeState& s, CudaStream stream) {
  launch(draft_kernel, {dim3(warps_for(s.B)), 32, 0, stream}, s);
}

}  // namespace v3b::kern
