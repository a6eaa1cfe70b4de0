// Backward of a top-k selection (SPEC 1.24). Bound by bytes: every ds is written once (4 T E), only the selected dy are
// read (sectors of 32 bytes); straight-through copies (8 T E). One warp a token.
#include "kernels/core/cuda_vector.cuh"
#include "kernels/gemm/rows_cuda.h"

namespace v3b::kern {
namespace {

using namespace dev;

constexpr int kThreads = 256;

__global__ void __launch_bounds__(kThreads) exact_kernel(spec::TopkBackwardArgs a, bool wide) {
  const int64_t t = static_cast<int64_t>(blockIdx.x) * (kThreads / 32) + warp_id();
  if (t >= a.T) return;  // whole warps
  const float* dy = a.dy + t * a.E;
  for (int64_t first = 0; first < a.E; first += 128) {
    const int64_t e = first + 4 * lane_id();
    float v[4] = {};
    for (int64_t k0 = 0; k0 < a.K; k0 += 32) {
      const int mine = k0 + lane_id() < a.K ? a.idx[t * a.K + k0 + lane_id()] : -1;
      const int count = static_cast<int>(min(a.K - k0, int64_t{32}));
      for (int k = 0; k < count; ++k) {
        const int64_t at = __shfl_sync(kFullMask, mine, k) - e;
        if (at < 0 || at >= 4) continue;
        const float g = dy[e + at];
#pragma unroll
        for (int i = 0; i < 4; ++i)
          if (at == i) v[i] = g;
      }
    }
    if (wide && e + 4 <= a.E) {
      store16(a.ds + t * a.E + e, make_uint4(__float_as_uint(v[0]), __float_as_uint(v[1]),
                                             __float_as_uint(v[2]), __float_as_uint(v[3])));
    } else {
#pragma unroll
      for (int i = 0; i < 4; ++i)
        if (e + i < a.E) a.ds[t * a.E + e + i] = v[i];
    }
  }
}

__global__ void __launch_bounds__(kThreads)
    copy_kernel(const float* from, float* to, int64_t n, bool wide) {
  const int64_t at = 8 * (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x);
  if (at >= n) return;
  float v[8];
  load8(from + at, wide, n - at, v);
  store8(to + at, wide, n - at, v);
}

}  // namespace

void topk_backward_cuda_simt(const spec::TopkBackwardArgs& a, CudaStream stream) {
  const int64_t n = a.T * a.E;
  if (n == 0) return;
  if (a.ste) {
    launch(
        copy_kernel,
        {dim3(static_cast<unsigned>((n + 8 * kThreads - 1) / (8 * kThreads))), kThreads, 0, stream},
        a.dy, a.ds, n, aligned16(a.dy, a.ds));
    return;
  }
  const int64_t rows = kThreads / 32;
  launch(exact_kernel, {dim3(static_cast<unsigned>((a.T + rows - 1) / rows)), kThreads, 0, stream},
         a, a.E % 4 == 0 && aligned16(a.ds));
}

}  // namespace v3b::kern
