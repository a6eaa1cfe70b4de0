// FMA rate of AVX-512 and the int8 rate of VNNI: sixteen independent chains (latency 4 on two pipes needs 8). More than 16
// turns of the inner loop GCC does not unroll, and the accumulators then lie in memory: 20 chains showed 3/4 of the rate.
#include <immintrin.h>

#include "bench/harness/peaks_kernels.h"

namespace v3b::bench {
namespace {
constexpr int kChains = 16, kUnroll = 8;
}

double rate_f32_avx512(int64_t rounds, double* sink) noexcept {
  __m512 acc[kChains];
  for (int i = 0; i < kChains; ++i) acc[i] = _mm512_set1_ps(1.0f + static_cast<float>(i));
  const __m512 a = _mm512_set1_ps(0.999f), b = _mm512_set1_ps(0.001f);
  for (int64_t r = 0; r < rounds; ++r)
    for (int u = 0; u < kUnroll; ++u)
#pragma GCC unroll 16
      for (int i = 0; i < kChains; ++i) acc[i] = _mm512_fmadd_ps(acc[i], a, b);
  for (int i = 0; i < kChains; ++i) *sink += static_cast<double>(_mm512_cvtss_f32(acc[i]));
  return static_cast<double>(rounds) * kUnroll * kChains * 16 * 2;
}

double rate_f64_avx512(int64_t rounds, double* sink) noexcept {
  __m512d acc[kChains];
  for (int i = 0; i < kChains; ++i) acc[i] = _mm512_set1_pd(1.0 + i);
  const __m512d a = _mm512_set1_pd(0.999), b = _mm512_set1_pd(0.001);
  for (int64_t r = 0; r < rounds; ++r)
    for (int u = 0; u < kUnroll; ++u)
#pragma GCC unroll 16
      for (int i = 0; i < kChains; ++i) acc[i] = _mm512_fmadd_pd(acc[i], a, b);
  for (int i = 0; i < kChains; ++i) *sink += _mm512_cvtsd_f64(acc[i]);
  return static_cast<double>(rounds) * kUnroll * kChains * 8 * 2;
}

// The instruction is written out: the compiler flag for VNNI is not part of this file's level.
double rate_int8_avx512(int64_t rounds, double* sink) noexcept {
  __m512i acc[kChains];
  for (int i = 0; i < kChains; ++i) acc[i] = _mm512_set1_epi32(i);
  const __m512i a = _mm512_set1_epi8(1), b = _mm512_set1_epi8(2);
  for (int64_t r = 0; r < rounds; ++r)
    for (int u = 0; u < kUnroll; ++u)
#pragma GCC unroll 16
      for (int i = 0; i < kChains; ++i)
        __asm__ volatile("vpdpbusd %2, %1, %0" : "+v"(acc[i]) : "v"(a), "v"(b));
  alignas(64) int32_t out[16];
  for (int i = 0; i < kChains; ++i) {
    _mm512_store_si512(out, acc[i]);
    *sink += out[0];
  }
  return static_cast<double>(rounds) * kUnroll * kChains * 64 * 2;
}

}  // namespace v3b::bench
