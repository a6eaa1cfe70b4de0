// Embedding gather (SPEC 1.1): rows copied, nothing else. Bandwidth-bound.
#include <cstring>

#include "kernels/core/team.h"
#include "kernels/norm_rope/stream.h"
#include "kernels/norm_rope/stream_copy.h"
#include "kernels/norm_rope/swiglu.h"

namespace v3b::kern {

void embedding_cpu_copy(const spec::EmbeddingArgs& a) noexcept {
  const int64_t row = a.d * spec::dtype_bytes(a.dtype);
  const char* table = static_cast<const char*>(a.table);
  char* y = static_cast<char*>(a.y);
  const int threads = team_for(2.0 * static_cast<double>(a.T) * static_cast<double>(row), 0);
  const bool stream = stream_output(a.T * row) && line_aligned(y, row);
  for_spans(a.T, threads, [&](int64_t lo, int64_t hi) {
    for (int64_t t = lo; t < hi; ++t) {
      const char* from = table + a.ids[t] * row;
      if (stream)
        copy_past_caches(y + t * row, from, row, t + 1 < hi ? table + a.ids[t + 1] * row : nullptr);
      else
        std::memcpy(y + t * row, from, static_cast<size_t>(row));
    }
    if (stream) end_streaming();
  });
}

}  // namespace v3b::kern
