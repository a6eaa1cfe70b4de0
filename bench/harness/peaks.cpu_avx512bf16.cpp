// Rate of VDPBF16PS: 32 products of bf16 pairs an instruction, sixteen independent chains (peaks.cpu_avx512.cpp says why
// not more).
#include <immintrin.h>

#include "bench/harness/peaks_kernels.h"

namespace v3b::bench {
namespace {
constexpr int kChains = 16, kUnroll = 8;
}

double rate_bf16_avx512(int64_t rounds, double* sink) noexcept {
  __m512 acc[kChains];
  for (int i = 0; i < kChains; ++i) acc[i] = _mm512_set1_ps(static_cast<float>(i));
  const __m512bh a = reinterpret_cast<__m512bh>(_mm512_set1_epi16(0x3c00)), b = a;  // about 0.0078
  for (int64_t r = 0; r < rounds; ++r)
    for (int u = 0; u < kUnroll; ++u)
#pragma GCC unroll 16
      for (int i = 0; i < kChains; ++i) acc[i] = _mm512_dpbf16_ps(acc[i], a, b);
  for (int i = 0; i < kChains; ++i) *sink += static_cast<double>(_mm512_cvtss_f32(acc[i]));
  return static_cast<double>(rounds) * kUnroll * kChains * 32 * 2;
}

}  // namespace v3b::bench
