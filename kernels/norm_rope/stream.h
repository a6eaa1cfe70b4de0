// Which outputs are written past the caches, and how rows are dealt out to threads.
#pragma once
#include <omp.h>

#include <algorithm>
#include <cstdint>

#include "kernels/core/cpu.h"

namespace v3b::kern {

// A line that is stored into without having been read is fetched first and written back later: three times over the
// bus for what a streaming store does once. An output that the threads' second-level caches cannot hold beside the
// input is streamed; a smaller one (a decode step) stays where the next kernel finds it.
inline bool stream_output(int64_t bytes) {
  constexpr int64_t kUnknownL2 = 1 << 20;
  const int64_t l2 = cpu_features().l2_bytes > 0 ? cpu_features().l2_bytes : kUnknownL2;
  return 2 * bytes > l2 * num_threads();
}
// Streaming stores are of whole vectors: every row has to begin on a cache line.
inline bool line_aligned(const void* p, int64_t stride_bytes) {
  return (reinterpret_cast<uintptr_t>(p) | static_cast<uintptr_t>(stride_bytes)) % 64 == 0;
}

// span(lo, hi) for each thread's share of [0, n), in units of `step`.
template <class Span>
void for_spans(int64_t n, int threads, const Span& span, int64_t step = 1) {
  const int64_t units = (n + step - 1) / step;
  if (units <= 1 || threads <= 1) return span(int64_t{0}, n);
#pragma omp parallel num_threads(threads)
  {
    const int64_t t = omp_get_num_threads(), i = omp_get_thread_num();
    const int64_t lo = units * i / t * step, hi = std::min(n, units * (i + 1) / t * step);
    if (lo < hi) span(lo, hi);
  }
}

}  // namespace v3b::kern
