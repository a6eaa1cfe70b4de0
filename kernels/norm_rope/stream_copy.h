// Rows copied past the caches (AVX2, which the whole build needs).
#pragma once
#include <immintrin.h>

#include <cstdint>
#include <cstring>

namespace v3b::kern {

// `bytes` a multiple of 64, to aligned to 64. `next`: where the row that is copied after this one begins: all of it is
// asked for into L2 meanwhile, since no hardware prefetch knows where it lies and each trains anew on every row; null:
// memory goes on behind this row.
inline void copy_past_caches(void* to, const void* from, int64_t bytes, const void* next) {
  constexpr int64_t kAhead = 1024;
  const char* p = static_cast<const char*>(from);
  const char* ask = next != nullptr ? static_cast<const char*>(next) : p + kAhead;
  char* q = static_cast<char*>(to);
  for (int64_t i = 0; i < bytes; i += 64) {
    _mm_prefetch(ask + i, _MM_HINT_T1);
    const __m256i a = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + i));
    const __m256i b = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + i + 32));
    _mm256_stream_si256(reinterpret_cast<__m256i*>(q + i), a);
    _mm256_stream_si256(reinterpret_cast<__m256i*>(q + i + 32), b);
  }
}
// The same without asking for anything.
inline void lines_past_caches(void* to, const void* from, int64_t bytes) {
  const char* p = static_cast<const char*>(from);
  char* q = static_cast<char*>(to);
  for (int64_t i = 0; i < bytes; i += 64) {
    const __m256i a = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + i));
    const __m256i b = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + i + 32));
    _mm256_stream_si256(reinterpret_cast<__m256i*>(q + i), a);
    _mm256_stream_si256(reinterpret_cast<__m256i*>(q + i + 32), b);
  }
}
// What streamed must be seen before whatever is stored next by this thread.
inline void end_streaming() { _mm_sfence(); }

}  // namespace v3b::kern
