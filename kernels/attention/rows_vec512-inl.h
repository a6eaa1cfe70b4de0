// Packing, softmax and FP8 records of rows.h with AVX512_BF16, for the hermetic files: everything has internal linkage.
// Bounds (cycles of a core with one 512-bit FMA, one add and one shuffle a cycle): softmax 6 FMA-class operations a
// vector of 16 scores and 1 load in the first pass: 8; V: 2 shuffles and 2 stores for 2 keys of 32 columns; a record:
// 11 operations for 32 codes, 16 x 11 / 2 = 88 a key.
#pragma once
#include <immintrin.h>

#include <cstdint>
#include <cstring>

#include "kernels/attention/rows.h"
#include "kernels/gemm/transpose_avx512-inl.h"

namespace v3b::kern {
namespace {

// 2^x for x <= 0: minimax of degree 5 on [-1/2, 1/2] with p(0) = 1, 9e-8 relative; 0 below -126, NaN stays.
inline __m512 exp2_512(__m512 x) {
  const __m512 n = _mm512_roundscale_ps(x, 0), r = _mm512_sub_ps(x, n);
  __m512 p = _mm512_set1_ps(1.326471501e-03f);
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(9.671513527e-03f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(5.550733784e-02f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(2.402224207e-01f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(6.931469776e-01f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f));
  return _mm512_maskz_scalef_ps(_mm512_cmp_ps_mask(x, _mm512_set1_ps(-126.0f), _CMP_NLT_UQ), p, n);
}

// Words 0, 16, 1, 17, ...: the halves of a register interleaved.
inline __m512i interleave_index() {
  alignas(64) static constexpr uint16_t kIndex[32] = {0,  16, 1,  17, 2,  18, 3,  19, 4,  20, 5,
                                                      21, 6,  22, 7,  23, 8,  24, 9,  25, 10, 26,
                                                      11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  return _mm512_load_si512(kIndex);
}

// Words 0-15 of two registers in pairs; 16 more: words 16-31.
[[maybe_unused]] inline __m512i low_pairs() {
  alignas(64) static constexpr uint16_t kLow[32] = {0,  32, 1,  33, 2,  34, 3,  35, 4,  36, 5,
                                                    37, 6,  38, 7,  39, 8,  40, 9,  41, 10, 42,
                                                    11, 43, 12, 44, 13, 45, 14, 46, 15, 47};
  return _mm512_load_si512(kLow);
}

// How far a maximum may grow before what was summed is scaled: P stays below 2^8, sums and rounding lose nothing by
// it, and after the first block hardly any row is scaled.
constexpr float kSlack = 8;

template <bool kRows>
void softmax_512(int64_t n, int64_t width, float scale_log2, const int32_t* visible, float* S,
                 uint32_t* P, float* m, float* l, float* alpha) {
  const __m512 c = _mm512_set1_ps(scale_log2), minus_inf = _mm512_set1_ps(-__builtin_inff());
  const __m512i index = interleave_index();
  for (int64_t v = 0; v < width; v += 16) {
    float* s = S + v;
    if (visible != nullptr) {
      const __m512i vis = _mm512_loadu_si512(visible + v);
      for (int64_t j = 0; j < n; ++j) {
        const __mmask16 hidden =
            _mm512_cmple_epi32_mask(vis, _mm512_set1_epi32(static_cast<int32_t>(j)));
        _mm512_mask_storeu_ps(s + j * width, hidden, minus_inf);
      }
    }
    __m512 top[4] = {minus_inf, minus_inf, minus_inf,
                     minus_inf};  // may lose a NaN; the sum keeps it
    int64_t j = 0;
    for (; j + 4 <= n; j += 4)
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i)
        top[i] = _mm512_max_ps(_mm512_loadu_ps(s + (j + i) * width), top[i]);
    for (; j < n; ++j) top[0] = _mm512_max_ps(_mm512_loadu_ps(s + j * width), top[0]);
    const __m512 highest = _mm512_mul_ps(
        _mm512_max_ps(_mm512_max_ps(top[0], top[1]), _mm512_max_ps(top[2], top[3])), c);
    const __m512 old = _mm512_loadu_ps(m + v);
    const __mmask16 grows =
        _mm512_cmp_ps_mask(highest, _mm512_add_ps(old, _mm512_set1_ps(kSlack)), _CMP_GT_OQ);
    const __m512 now = _mm512_mask_mov_ps(old, grows, highest);
    // Nothing visible yet: any finite base.
    const __m512 base = _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(now, minus_inf, _CMP_NEQ_UQ), now);
    const __m512 a = exp2_512(_mm512_sub_ps(old, base));
    __m512 sum0 = _mm512_setzero_ps(), sum1 = _mm512_setzero_ps();
    const auto p_at = [&](int64_t i) __attribute__((always_inline)) {
      return exp2_512(_mm512_fmsub_ps(_mm512_loadu_ps(s + i * width), c, base));
    };
    const auto pair_at = [&](int64_t i) __attribute__((always_inline)) {  // keys i, i + 1
      const __m512 p0 = p_at(i), p1 = i + 1 < n ? p_at(i + 1) : _mm512_setzero_ps();
      sum0 = _mm512_add_ps(sum0, p0);
      sum1 = _mm512_add_ps(sum1, p1);
      return _mm512_permutexvar_epi16(index, (__m512i)_mm512_cvtne2ps_pbh(p1, p0));
    };
    if constexpr (kRows) {
      for (int64_t j0 = 0; j0 < n; j0 += 32) {
        __m512i t[16];
        for (int i = 0; i < 16; ++i)
          t[i] = j0 + 2 * i < n ? pair_at(j0 + 2 * i) : _mm512_setzero_si512();
        transpose16(t);
        for (int i = 0; i < 16; ++i) _mm512_storeu_si512(P + (v + i) * kPairRow + j0 / 2, t[i]);
      }
    } else {
      for (j = 0; j < n; j += 2) _mm512_storeu_si512(P + j / 2 * width + v, pair_at(j));
    }
    _mm512_storeu_ps(m + v, now);
    _mm512_storeu_ps(l + v, _mm512_fmadd_ps(_mm512_loadu_ps(l + v), a, _mm512_add_ps(sum0, sum1)));
    _mm512_storeu_ps(alpha + v, a);
  }
}

[[maybe_unused]] void pack_values_512(int64_t n, int64_t d, const uint8_t* rows, int64_t stride,
                                      int64_t first, int64_t K, uint32_t* dst) {
  const __m512i low = low_pairs(), high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
  for (int64_t p = 0; p < d; p += 64) {
    const int64_t vectors = (d - p + 15) / 16 < 4 ? (d - p + 15) / 16 : 4, width = 16 * vectors;
    for (int64_t c = p; c < p + width; c += 32) {
      const int64_t left = d - c;
      const __mmask32 mask = left >= 32 ? ~__mmask32{0} : (__mmask32{1} << left) - 1;
      const bool two = c + 16 < p + width;
      uint32_t* out = dst + p * K + first * width + (c - p);
      const uint8_t* r = rows + 2 * c;
      for (int64_t j = 0; j < n; j += 2, r += 2 * stride, out += width) {
        const __m512i r0 = _mm512_maskz_loadu_epi16(mask, r),
                      r1 = _mm512_maskz_loadu_epi16(j + 1 < n ? mask : 0, r + stride);
        _mm512_storeu_si512(out, _mm512_permutex2var_epi16(r0, low, r1));
        if (two) _mm512_storeu_si512(out + 16, _mm512_permutex2var_epi16(r0, high, r1));
      }
    }
  }
}

[[maybe_unused]] void pack_lanes_512(const uint8_t* const* rows, int64_t count, int64_t units,
                                     uint32_t* dst, int64_t width) {
  for (int64_t k = 0; k < units; k += 16) {
    const int64_t left = units - k;
    const __mmask16 mask = left >= 16 ? __mmask16{0xffff} : static_cast<__mmask16>((1 << left) - 1);
    __m512i t[16];
    for (int i = 0; i < 16; ++i)
      t[i] = i < count ? _mm512_maskz_loadu_epi32(mask, rows[i] + 4 * k) : _mm512_setzero_si512();
    transpose16(t);
    for (int i = 0; i < 16 && i < left; ++i) _mm512_storeu_si512(dst + (k + i) * width, t[i]);
  }
}

// 16 rows of C and 16 lanes at a time: pairs of rows rounded together, then turned as units.
[[maybe_unused]] void store_turned_512(const float* c, int64_t n, int64_t width, int64_t lanes,
                                       uint16_t* out, int64_t ld) {
  const __m512i index = interleave_index();
  for (int64_t l = 0; l < lanes; l += 16) {
    const int64_t count = lanes - l < 16 ? lanes - l : 16;
    for (int64_t i = 0; i < n; i += 32) {
      __m512i t[16];
      const int64_t left = n - i;
      for (int k = 0; k < 16; ++k) {
        const float* row = c + (i + 2 * k) * width + l;
        t[k] = _mm512_setzero_si512();
        if (2 * k < left) {
          const __m512 x0 = _mm512_loadu_ps(row),
                       x1 = 2 * k + 1 < left ? _mm512_loadu_ps(row + width) : _mm512_setzero_ps();
          t[k] = _mm512_permutexvar_epi16(index, (__m512i)_mm512_cvtne2ps_pbh(x1, x0));
        }
      }
      transpose16(t);
      const __mmask32 mask = left >= 32 ? ~__mmask32{0} : (__mmask32{1} << left) - 1;
      for (int k = 0; k < 16; ++k)
        if (k < count) _mm512_mask_storeu_epi16(out + (l + k) * ld + i, mask, t[k]);
    }
  }
}

// Bits of a code moved to a float's place: the value times 2^-120 (exact, subnormals too).
inline __m512 widen_e4m3(const uint8_t* p) {
  const __m512i x = _mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  return _mm512_castsi512_ps(_mm512_and_si512(
      _mm512_slli_epi32(x, 20), _mm512_set1_epi32(static_cast<int32_t>(0x87f00000u))));
}

[[maybe_unused]] void read_record_512(const uint8_t* rec, int64_t d_c, int64_t d_r, uint8_t* out) {
  const __m512 up = _mm512_set1_ps(0x1p120f);
  const __m256i seven = _mm256_set1_epi8(0x7f);
  const int64_t tiles = (d_c + 127) / 128;
  for (int64_t t = 0; t < tiles; ++t) {
    float scale;
    std::memcpy(&scale, rec + d_c + 4 * t, 4);
    const __m512 vs = _mm512_set1_ps(scale);
    const int64_t last = d_c < (t + 1) * 128 ? d_c : (t + 1) * 128;
    for (int64_t i = t * 128; i < last; i += 32) {
      const int64_t left = last - i;
      alignas(32) uint8_t tail[32];
      const uint8_t* codes = rec + i;
      if (left < 32) {
        std::memset(tail, 0, sizeof tail);
        std::memcpy(tail, codes, static_cast<size_t>(left));
        codes = tail;
      }
      // Times 2^120 first: exact, and the scale then rounds once as SPEC 1.9 does.
      const __m512 x0 = _mm512_mul_ps(_mm512_mul_ps(widen_e4m3(codes), up), vs);
      const __m512 x1 = _mm512_mul_ps(_mm512_mul_ps(widen_e4m3(codes + 16), up), vs);
      __m512i y = (__m512i)_mm512_cvtne2ps_pbh(x1, x0);
      const __m256i magnitude =
          _mm256_and_si256(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes)), seven);
      y = _mm512_mask_mov_epi16(y, _mm256_cmpeq_epi8_mask(magnitude, seven),
                                _mm512_set1_epi16(0x7fc0));
      const __mmask32 mask = left >= 32 ? ~__mmask32{0} : (__mmask32{1} << left) - 1;
      _mm512_mask_storeu_epi16(out + 2 * i, mask, y);
    }
  }
  std::memcpy(out + 2 * d_c, rec + d_c + 4 * tiles, static_cast<size_t>(2 * d_r));
}

}  // namespace
}  // namespace v3b::kern
