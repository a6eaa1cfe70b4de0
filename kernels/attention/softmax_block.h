// Online softmax of a block of scores for the compositions of oneDNN products. Plain loops that GCC
// turns into SIMD; internal linkage.
#pragma once
#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#include "reference/spec/dtype.h"
#include "reference/spec/flags.h"

namespace v3b::kern {

// 2^x for x <= 0, 0 below -126; NaN stays NaN.
static inline float exp2_nonpositive(float x) {
  const float c = x < -126.0f ? -126.0f : x;
  const float n = __builtin_floorf(c + 0.5f), r = c - n;
  float p = 1.5252734e-5f;
  p = p * r + 1.5403530e-4f;
  p = p * r + 1.3333558e-3f;
  p = p * r + 9.6181291e-3f;
  p = p * r + 5.5504109e-2f;
  p = p * r + 2.4022651e-1f;
  p = p * r + 6.9314718e-1f;
  p = p * r + 1.0f;
  const int32_t bits = (static_cast<int32_t>(n) + 127) << 23;
  const float y = p * std::bit_cast<float>(bits);
  return x < -126.0f ? 0.0f : y;
}

// s [n] scores of a row of which the first `visible` count -> p [n] (dtype f32 or bf16; zeros past
// visible). m, l: running maximum (log2 domain) and sum. Returns the factor for what was
// accumulated before.
[[maybe_unused]] static float softmax_row(float* s, int64_t n, int64_t visible, float scale_log2,
                                          spec::DType dtype, void* p, float& m, float& l) {
  float top = -std::numeric_limits<float>::infinity();
#pragma omp simd reduction(max : top)
  for (int64_t j = 0; j < visible; ++j) top = std::max(top, s[j]);
  const float now = visible > 0 ? std::max(m, top * scale_log2) : m;
  const float base = std::isinf(now) ? 0.0f : now;
  float sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t j = 0; j < visible; ++j) {
    s[j] = exp2_nonpositive(s[j] * scale_log2 - base);
    sum += s[j];
  }
  for (int64_t j = visible; j < n; ++j) s[j] = 0;
  if (dtype == spec::DType::bf16) {
    uint16_t* out = static_cast<uint16_t*>(p);
    for (int64_t j = 0; j < n; ++j) out[j] = spec::to_bf16(s[j]).bits;
  } else if (p != s) {
    std::memcpy(p, s, static_cast<size_t>(4 * n));
  }
  const float alpha = exp2_nonpositive(m - base);
  l = l * alpha + sum;
  m = now;
  return alpha;
}

// o [d] / l -> out, and the natural lse.
[[maybe_unused]] static float finish_softmax_row(const float* o, int64_t d, float m, float l,
                                                 spec::DType dtype, void* out, float empty_lse) {
  const float f = l == 0.0f ? 0.0f : 1.0f / l;
  if (dtype == spec::DType::bf16)
    for (int64_t c = 0; c < d; ++c) static_cast<uint16_t*>(out)[c] = spec::to_bf16(f * o[c]).bits;
  else
    for (int64_t c = 0; c < d; ++c) static_cast<float*>(out)[c] = f * o[c];
  return l == 0.0f ? empty_lse
                   : static_cast<float>(0.69314718055994530942 *
                                        (double{m} + std::log2(static_cast<double>(l))));
}

static inline float empty_lse_of(spec::EmptyLse flag) {
  const float inf = std::numeric_limits<float>::infinity();
  return flag == spec::EmptyLse::pos_inf ? inf : -inf;
}
static inline float log2_scale(double scale) {
  return static_cast<float>(scale * 1.44269504088896340736);
}

}  // namespace v3b::kern
