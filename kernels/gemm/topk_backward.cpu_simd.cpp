#include "kernels/gemm/topk_backward.h"

#include <omp.h>

#include <cstring>

#include "kernels/core/cpu.h"

namespace v3b::kern {

// One pass: the row is zeroed (or copied) by the library's vector stores and its K gradients
// written while it is in L1.
void topk_backward_cpu_simd(const spec::TopkBackwardArgs& a) noexcept {
  const size_t row_bytes = static_cast<size_t>(a.E) * sizeof(float);
#pragma omp parallel for schedule(static) if (a.T * a.E >= (1 << 16) && num_threads() > 1)
  for (int64_t t = 0; t < a.T; ++t) {
    const float* dy = a.dy + t * a.E;
    float* ds = a.ds + t * a.E;
    if (a.ste) {
      std::memcpy(ds, dy, row_bytes);
      continue;
    }
    std::memset(ds, 0, row_bytes);
    for (int64_t k = 0; k < a.K; ++k) ds[a.idx[t * a.K + k]] = dy[a.idx[t * a.K + k]];
  }
}

}  // namespace v3b::kern
