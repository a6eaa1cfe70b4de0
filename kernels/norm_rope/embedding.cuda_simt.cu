// Embedding gather (SPEC 1.1): rows of bytes. Bound by bytes: 2 d e a token.
#include "kernels/core/cuda_vector.cuh"
#include "kernels/norm_rope/norm_rope_cuda.h"

namespace v3b::kern {
namespace {

using namespace dev;

constexpr int kThreads = 256;
constexpr int kEach = 4;  // units a thread has in flight

template <class Unit>
__device__ __forceinline__ Unit load_unit(const Unit* p) {
  if constexpr (sizeof(Unit) == 16)
    return load16(p);
  else
    return *p;
}
template <class Unit>
__device__ __forceinline__ void store_unit(Unit* p, Unit v) {
  if constexpr (sizeof(Unit) == 16)
    store16(p, v);
  else
    *p = v;
}

template <class Unit>
__global__ void __launch_bounds__(kThreads)
    embedding_kernel(int64_t units, const int32_t* ids, const Unit* table, Unit* y) {
  const int64_t t = blockIdx.x;
  const Unit* from = table + static_cast<int64_t>(ids[t]) * units;
  Unit* to = y + t * units;
  const int64_t first = static_cast<int64_t>(blockIdx.y) * kThreads * kEach + threadIdx.x;
  Unit v[kEach];
#pragma unroll
  for (int i = 0; i < kEach; ++i)
    if (first + i * kThreads < units) v[i] = load_unit(from + first + i * kThreads);
#pragma unroll
  for (int i = 0; i < kEach; ++i)
    if (first + i * kThreads < units) store_unit(to + first + i * kThreads, v[i]);
}

template <class Unit>
void run(const spec::EmbeddingArgs& a, int64_t row_bytes, CudaStream stream) {
  const int64_t units = row_bytes / static_cast<int64_t>(sizeof(Unit)), each = kThreads * kEach;
  launch(embedding_kernel<Unit>,
         {dim3(static_cast<unsigned>(a.T), static_cast<unsigned>((units + each - 1) / each)),
          kThreads, 0, stream},
         units, a.ids, static_cast<const Unit*>(a.table), static_cast<Unit*>(a.y));
}

}  // namespace

void embedding_cuda_simt(const spec::EmbeddingArgs& a, CudaStream stream) {
  const int64_t row = a.d * spec::dtype_bytes(a.dtype);
  if (a.T == 0 || row == 0) return;
  const uintptr_t all = reinterpret_cast<uintptr_t>(a.table) | reinterpret_cast<uintptr_t>(a.y) |
                        static_cast<uintptr_t>(row);
  if (all % 16 == 0)
    run<uint4>(a, row, stream);
  else if (all % 4 == 0)
    run<uint32_t>(a, row, stream);
  else if (all % 2 == 0)
    run<uint16_t>(a, row, stream);
  else
    run<uint8_t>(a, row, stream);
}

}  // namespace v3b::kern
