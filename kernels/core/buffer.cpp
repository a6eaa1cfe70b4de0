#include "kernels/core/buffer.h"

#include <omp.h>
#include <sys/mman.h>

#include <cstdlib>
#include <cstring>
#include <new>

namespace v3b::kern {
namespace {
constexpr size_t kHugePage = size_t{2} << 20;
constexpr size_t kTouchGrain = size_t{1} << 20;  // below this one thread touches all
}  // namespace

void* aligned_alloc_bytes(size_t bytes, bool touch) {
  if (bytes == 0) return nullptr;
  const bool huge = bytes >= kHugePage;
  const size_t align = huge ? kHugePage : kBufferAlign;
  const size_t rounded = (bytes + kBufferAlign - 1) / kBufferAlign * kBufferAlign;
  void* p = nullptr;
  if (rounded < bytes || posix_memalign(&p, align, rounded) != 0) throw std::bad_alloc();
  if (huge) (void)madvise(p, rounded / kHugePage * kHugePage, MADV_HUGEPAGE);  // advice only
  if (touch) {
    char* c = static_cast<char*>(p);
    if (bytes < kTouchGrain || omp_in_parallel() != 0) {
      std::memset(c, 0, bytes);
    } else {
#pragma omp parallel
      {
        const size_t n = static_cast<size_t>(omp_get_num_threads());
        const size_t i = static_cast<size_t>(omp_get_thread_num());
        const size_t lo = bytes / n * i, hi = i + 1 == n ? bytes : bytes / n * (i + 1);
        std::memset(c + lo, 0, hi - lo);
      }
    }
  }
  return p;
}

void aligned_free_bytes(void* p, size_t) noexcept { std::free(p); }

}  // namespace v3b::kern
