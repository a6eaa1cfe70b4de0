// Embedding gather (SPEC 1.1): rows copied, nothing else. Bandwidth-bound.
#include <cstring>

#include "kernels/core/team.h"
#include "kernels/norm_rope/swiglu.h"

namespace v3b::kern {

void embedding_cpu_copy(const spec::EmbeddingArgs& a) noexcept {
  const int64_t row = a.d * spec::dtype_bytes(a.dtype);
  const char* table = static_cast<const char*>(a.table);
  char* y = static_cast<char*>(a.y);
  const int threads = team_for(2.0 * static_cast<double>(a.T) * static_cast<double>(row), 0);
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t t = 0; t < a.T; ++t)
    std::memcpy(y + t * row, table + a.ids[t] * row, static_cast<size_t>(row));
}

}  // namespace v3b::kern
