// FMA rate of AVX2: twelve independent chains hide the latency of two pipes.
#include <immintrin.h>

#include "bench/harness/peaks_kernels.h"

namespace v3b::bench {
namespace {
constexpr int kChains = 12, kUnroll = 8;
}

double rate_f32_avx2(int64_t rounds, double* sink) noexcept {
  __m256 acc[kChains];
  for (int i = 0; i < kChains; ++i) acc[i] = _mm256_set1_ps(1.0f + static_cast<float>(i));
  const __m256 a = _mm256_set1_ps(0.999f), b = _mm256_set1_ps(0.001f);
  for (int64_t r = 0; r < rounds; ++r)
    for (int u = 0; u < kUnroll; ++u)
#pragma GCC unroll 16
      for (int i = 0; i < kChains; ++i) acc[i] = _mm256_fmadd_ps(acc[i], a, b);
  for (int i = 0; i < kChains; ++i) *sink += static_cast<double>(_mm256_cvtss_f32(acc[i]));
  return static_cast<double>(rounds) * kUnroll * kChains * 8 * 2;
}

double rate_f64_avx2(int64_t rounds, double* sink) noexcept {
  __m256d acc[kChains];
  for (int i = 0; i < kChains; ++i) acc[i] = _mm256_set1_pd(1.0 + i);
  const __m256d a = _mm256_set1_pd(0.999), b = _mm256_set1_pd(0.001);
  for (int64_t r = 0; r < rounds; ++r)
    for (int u = 0; u < kUnroll; ++u)
#pragma GCC unroll 16
      for (int i = 0; i < kChains; ++i) acc[i] = _mm256_fmadd_pd(acc[i], a, b);
  for (int i = 0; i < kChains; ++i) *sink += _mm256_cvtsd_f64(acc[i]);
  return static_cast<double>(rounds) * kUnroll * kChains * 4 * 2;
}

}  // namespace v3b::bench
