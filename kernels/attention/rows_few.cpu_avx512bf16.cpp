// Up to eight rows that share keys (GQA decode, MHA) with AVX512_BF16: too few to fill lanes, so lanes run along the
// head dimension, as elements and queries lie. Keys and values are read in place, once.
// Bound, d = 128, four rows: a key's scores are 4 x 4 VDPBF16PS and a quarter of the 30 shuffles that add up 16
// registers, its values 4 x 4 and 4 shuffles: 32 cycles of the multipliers, 12 of the shuffles beside them, 12 loads;
// 512 bytes in about 40 cycles are 45 GB/s of a core at 3.5 GHz: bound by memory from two cores on.
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>

#include <cstdint>
#include <cstring>

#include "kernels/attention/rows.h"
#include "kernels/attention/rows_vec512-inl.h"

namespace v3b::kern {
namespace {

constexpr int64_t kBlock = 64;  // keys

// The next block's line. One or two rows stream as fast as the memory goes, and the hardware's prefetch does better.
template <int R>
inline void fetch_later(const uint8_t* p) {
  if constexpr (R > 2) _mm_prefetch(reinterpret_cast<const char*>(p), _MM_HINT_T1);
}

// v[i] -> lane i of the result: the sum of v[i]'s lanes.
inline __m512 sums16(const __m512* v) {
  __m512 a[8], b[4], c[2];
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i)
    a[i] = _mm512_add_ps(_mm512_unpacklo_ps(v[2 * i], v[2 * i + 1]),
                         _mm512_unpackhi_ps(v[2 * i], v[2 * i + 1]));
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const __m512d x = _mm512_castps_pd(a[2 * i]), y = _mm512_castps_pd(a[2 * i + 1]);
    b[i] = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(x, y)),
                         _mm512_castpd_ps(_mm512_unpackhi_pd(x, y)));
  }
#pragma GCC unroll 2
  for (int i = 0; i < 2; ++i)
    c[i] = _mm512_add_ps(_mm512_shuffle_f32x4(b[2 * i], b[2 * i + 1], 0x88),
                         _mm512_shuffle_f32x4(b[2 * i], b[2 * i + 1], 0xdd));
  return _mm512_add_ps(_mm512_shuffle_f32x4(c[0], c[1], 0x88),
                       _mm512_shuffle_f32x4(c[0], c[1], 0xdd));
}

// Scores of R rows and 16 / (R rounded up to 1, 2, 4) keys at a time. q [R][dp] with zeros past d; ahead: bytes from a
// key to the one of the next block.
template <int R>
void scores(int64_t n, const uint8_t* k, int64_t stride, int64_t d, const uint16_t* q, int64_t dp,
            int64_t ahead, float* s) {
  constexpr int kKeys = R == 1 ? 16 : R == 2 ? 8 : 4;
  for (int64_t j = 0; j < n; j += kKeys) {
    const uint8_t* row[kKeys];
#pragma GCC unroll 16
    for (int i = 0; i < kKeys; ++i) row[i] = k + (j + i < n ? j + i : n - 1) * stride;
    __m512 acc[16];
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) acc[i] = _mm512_setzero_ps();
    const auto step = [&](int i, int64_t c, __mmask32 mask, const __m512bh* vq)
        __attribute__((always_inline)) {
      const uint8_t* at = row[i] + 2 * c;
      fetch_later<R>(at + ahead);
      const __m512bh vk = (__m512bh)_mm512_maskz_loadu_epi16(mask, at);
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r)
        acc[r * kKeys + i] = _mm512_dpbf16_ps(acc[r * kKeys + i], vk, vq[r]);
    };
    const auto queries = [&](int64_t c, __m512bh * vq) __attribute__((always_inline)) {
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) vq[r] = (__m512bh)_mm512_loadu_si512(q + r * dp + c);
    };
    const auto mask_at = [&](int64_t c) __attribute__((always_inline)) {
      return d - c >= 32 ? ~__mmask32{0} : (__mmask32{1} << (d - c)) - 1;
    };
    // One or two rows: key after key, in the order of memory (16 keys side by side cost a third of the bandwidth).
    if constexpr (R <= 2) {
#pragma GCC unroll 16
      for (int i = 0; i < kKeys; ++i)
        for (int64_t c = 0; c < d; c += 32) {
          __m512bh vq[R];
          queries(c, vq);
          step(i, c, mask_at(c), vq);
        }
    } else {
      for (int64_t c = 0; c < d; c += 32) {
        __m512bh vq[R];
        queries(c, vq);
#pragma GCC unroll 16
        for (int i = 0; i < kKeys; ++i) step(i, c, mask_at(c), vq);
      }
    }
    const __m512 sum = sums16(acc);
    if constexpr (R == 1) {
      _mm512_storeu_ps(s + j, sum);
    } else if constexpr (R == 2) {
      _mm256_storeu_ps(s + j, _mm512_castps512_ps256(sum));
      _mm256_storeu_ps(s + kBlock + j, _mm512_extractf32x8_ps(sum, 1));
    } else {
      _mm_storeu_ps(s + j, _mm512_castps512_ps128(sum));
      _mm_storeu_ps(s + kBlock + j, _mm512_extractf32x4_ps(sum, 1));
      _mm_storeu_ps(s + 2 * kBlock + j, _mm512_extractf32x4_ps(sum, 2));
      if constexpr (R == 4) _mm_storeu_ps(s + 3 * kBlock + j, _mm512_extractf32x4_ps(sum, 3));
    }
  }
}

// One row of n scores, `visible` of them seen -> P in bf16, zeros to kBlock; m, l; the factor for what was summed before.
inline float softmax_row(int64_t visible, float scale_log2, const float* s, uint16_t* p, float& m,
                         float& l) {
  const __m512 c = _mm512_set1_ps(scale_log2), minus_inf = _mm512_set1_ps(-__builtin_inff());
  __m512 x[kBlock / 16], top = minus_inf;
#pragma GCC unroll 4
  for (int i = 0; i < kBlock / 16; ++i) {
    const int64_t left = visible - 16 * i;
    const __mmask16 seen = left >= 16  ? __mmask16{0xffff}
                           : left <= 0 ? __mmask16{0}
                                       : static_cast<__mmask16>((1 << left) - 1);
    x[i] = _mm512_mul_ps(_mm512_mask_loadu_ps(minus_inf, seen, s + 16 * i), c);
    top = _mm512_max_ps(x[i], top);  // may lose a NaN; the sum keeps it
  }
  const float highest = _mm512_reduce_max_ps(top), old = m;
  if (highest > old + kSlack) m = highest;
  const float base = m == -__builtin_inff() ? 0.0f : m;
  __m512 sum = _mm512_setzero_ps();
#pragma GCC unroll 4
  for (int i = 0; i < kBlock / 16; ++i) {
    const __m512 y = exp2_512(_mm512_sub_ps(x[i], _mm512_set1_ps(base)));
    sum = _mm512_add_ps(sum, y);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p + 16 * i), (__m256i)_mm512_cvtneps_pbh(y));
  }
  const float a = m == old ? 1.0f : _mm512_cvtss_f32(exp2_512(_mm512_set1_ps(old - base)));
  l = l * a + _mm512_reduce_add_ps(sum);
  return a;
}

// o [R][ldo] = factor o + P V, C registers of 32 columns of V at a time.
template <int R, int C>
int64_t values(int64_t n, const uint8_t* v, int64_t stride, int64_t c, int64_t d, const uint16_t* p,
               const float* factor, float* o, int64_t ldo, int64_t ahead) {
  const __m512i low = low_pairs(), high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
  for (; C == 1 ? c < d : c + 32 * C <= d; c += 32 * C) {
    const __mmask32 mask = d - c >= 32 ? ~__mmask32{0} : (__mmask32{1} << (d - c)) - 1;
    __m512 acc[R][2 * C];
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
      for (int i = 0; i < 2 * C; ++i)
        acc[r][i] =
            _mm512_mul_ps(_mm512_set1_ps(factor[r]), _mm512_loadu_ps(o + r * ldo + c + 16 * i));
    }
    const uint8_t* row = v + 2 * c;
    for (int64_t j = 0; j < n; j += 2, row += 2 * stride) {
      const bool two = j + 1 < n;
      __m512i b[2 * C];
#pragma GCC unroll 4
      for (int i = 0; i < C; ++i) {
        const uint8_t *r0 = row + 64 * i, *r1 = r0 + (two ? stride : 0);
        fetch_later<R>(r0 + ahead);
        fetch_later<R>(r1 + ahead);
        const __m512i x = _mm512_maskz_loadu_epi16(C == 1 ? mask : ~__mmask32{0}, r0);
        const __m512i y = _mm512_maskz_loadu_epi16(!two ? 0 : C == 1 ? mask : ~__mmask32{0}, r1);
        b[2 * i] = _mm512_permutex2var_epi16(x, low, y);
        b[2 * i + 1] = _mm512_permutex2var_epi16(x, high, y);
      }
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) {
        int32_t pair;
        std::memcpy(&pair, p + r * kBlock + j, 4);
        const __m512bh vp = (__m512bh)_mm512_set1_epi32(pair);
#pragma GCC unroll 8
        for (int i = 0; i < 2 * C; ++i) acc[r][i] = _mm512_dpbf16_ps(acc[r][i], vp, (__m512bh)b[i]);
      }
    }
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
      for (int i = 0; i < 2 * C; ++i) _mm512_storeu_ps(o + r * ldo + c + 16 * i, acc[r][i]);
    }
  }
  return c;
}

template <int R>
void some_rows(const RowsTask& t, int64_t r0, int64_t j, int64_t n, int64_t next, const uint16_t* q,
               int64_t dp, float* o, int64_t ldo, float* m, float* l) {
  alignas(64) float s[R * kBlock];
  alignas(64) uint16_t p[R * kBlock];
  float factor[R];
  const int64_t ks = t.keys.k1_stride, vs = t.keys.v_stride;
  const uint8_t *k = t.keys.k1 + j * ks, *v = t.keys.v + j * vs;
  scores<R>(n, k, ks, t.d_qk, q, dp, next * ks, s);
  const float scale_log2 =
      static_cast<float>(static_cast<double>(t.scale) * 1.44269504088896340736);
  for (int r = 0; r < R; ++r) {
    const int64_t sees = t.lim0 + (r0 + r) / t.inner - j;
    factor[r] = softmax_row(sees < 0   ? 0
                            : sees < n ? sees
                                       : n,
                            scale_log2, s + r * kBlock, p + r * kBlock, m[r], l[r]);
  }
  constexpr int C = R <= 2 ? 4 : 2;
  int64_t c = values<R, C>(n, v, vs, 0, t.d_v, p, factor, o, ldo, next * vs);
  values<R, 1>(n, v, vs, c, t.d_v, p, factor, o, ldo, next * vs);
}
}  // namespace

void rows_few_avx512bf16(const RowsTask& t, float* o, int64_t ldo, float* m, float* l) noexcept {
  alignas(64) uint16_t q[kFewRows * kFewDims];
  const int64_t dp = (t.d_qk + 31) / 32 * 32;
  std::memset(q, 0, static_cast<size_t>(t.R * dp * 2));
  for (int64_t r = 0; r < t.R; ++r) {
    std::memcpy(
        q + r * dp,
        static_cast<const uint16_t*>(t.q) + r / t.inner * t.q_outer + r % t.inner * t.q_inner,
        static_cast<size_t>(2 * t.d_qk));
    m[r] = -__builtin_inff();
    l[r] = 0;
    std::memset(o + r * ldo, 0, static_cast<size_t>(4 * ldo));
  }
  const int64_t most = t.lim0 + (t.R - 1) / t.inner, end = t.j1 < most ? t.j1 : most;
  for (int64_t j = t.j0; j < end; j += kBlock) {
    const int64_t n = end - j < kBlock ? end - j : kBlock, next = end - j > kBlock ? kBlock : 0;
    for (int64_t r = 0; r < t.R; r += 4) {
      const uint16_t* qr = q + r * dp;
      float* or_ = o + r * ldo;
      switch (t.R - r) {
        case 1:
          some_rows<1>(t, r, j, n, next, qr, dp, or_, ldo, m + r, l + r);
          break;
        case 2:
          some_rows<2>(t, r, j, n, next, qr, dp, or_, ldo, m + r, l + r);
          break;
        case 3:
          some_rows<3>(t, r, j, n, next, qr, dp, or_, ldo, m + r, l + r);
          break;
        default:
          some_rows<4>(t, r, j, n, next, qr, dp, or_, ldo, m + r, l + r);
      }
    }
  }
}

}  // namespace v3b::kern
