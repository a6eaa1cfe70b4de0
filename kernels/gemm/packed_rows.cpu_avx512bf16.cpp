// Operands of the packed products (packed_weight.h): activations as pairs of bf16 in the order in which they are
// broadcast, 8 rows x 8 steps a time through a transpose in registers (24 shuffles for 64 pairs), and FP8 weights in
// blocks of 16 outputs x 4 codes.
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC target("avx512vbmi")
#include <immintrin.h>

#include "kernels/gemm/fp8_widen_avx512-inl.h"
#include "kernels/gemm/packed_weight.h"
#include "kernels/gemm/transpose_avx512-inl.h"

namespace v3b::kern {
namespace {

using spec::DType;

constexpr int64_t kChunk = 8, kAmxChunk = 16;

inline uint64_t first_bits(int64_t n) noexcept {
  return n >= 64 ? ~uint64_t{0} : n <= 0 ? 0 : (uint64_t{1} << n) - 1;
}

// 32 elements of a row as pairs, zeros from `left` on.
template <DType T>
inline __m512i load_pairs(const WidenTables& t, const uint8_t* p, int64_t left) noexcept {
  if constexpr (T == DType::bf16) {
    if (left >= 32) return _mm512_loadu_si512(p);
    return _mm512_maskz_loadu_epi16(static_cast<__mmask32>(first_bits(left)), p);
  } else if constexpr (T == DType::f32) {
    const __m512 lo =
        _mm512_maskz_loadu_ps(static_cast<__mmask16>(first_bits(left < 16 ? left : 16)), p);
    const __m512 hi = _mm512_maskz_loadu_ps(
        static_cast<__mmask16>(first_bits(left < 32 ? left - 16 : 16)), p + 64);
    return (__m512i)_mm512_cvtne2ps_pbh(hi, lo);
  } else {
    const __m256i c =
        _mm256_maskz_loadu_epi8(static_cast<__mmask32>(first_bits(left < 32 ? left : 32)), p);
    __m512i first, second;
    widen_in_order(t, _mm512_castsi256_si512(c), first, second);
    return first;
  }
}

// 32 columns of two rows of [K, ld] as pairs, zeros beyond: two lines, two permutations.
struct PairsOfColumns {
  __m512i first, second;
  PairsOfColumns() noexcept {
    alignas(64) uint16_t index[32];
    for (int i = 0; i < 32; ++i) index[i] = static_cast<uint16_t>(i / 2 + i % 2 * 32);
    first = _mm512_load_si512(index);
    second = _mm512_add_epi16(first, _mm512_set1_epi16(16));
  }
  void load(const uint16_t* p, int64_t ld, int64_t columns, int64_t depth, __m512i& a,
            __m512i& b) const noexcept {
    const auto mask = static_cast<__mmask32>(first_bits(columns < 32 ? columns : 32));
    const __m512i lo = depth > 0 ? _mm512_maskz_loadu_epi16(mask, p) : _mm512_setzero_si512(),
                  hi = depth > 1 ? _mm512_maskz_loadu_epi16(mask, p + ld) : _mm512_setzero_si512();
    a = _mm512_permutex2var_epi16(lo, first, hi), b = _mm512_permutex2var_epi16(lo, second, hi);
  }
};

inline void transpose8(__m256i (&r)[8]) noexcept {
  __m256i s[8];
#pragma GCC unroll 8
  for (int i = 0; i < 8; i += 2) {
    s[i] = _mm256_unpacklo_epi32(r[i], r[i + 1]);
    s[i + 1] = _mm256_unpackhi_epi32(r[i], r[i + 1]);
  }
#pragma GCC unroll 8
  for (int i = 0; i < 8; i += 4) {
    r[i] = _mm256_unpacklo_epi64(s[i], s[i + 2]);
    r[i + 1] = _mm256_unpackhi_epi64(s[i], s[i + 2]);
    r[i + 2] = _mm256_unpacklo_epi64(s[i + 1], s[i + 3]);
    r[i + 3] = _mm256_unpackhi_epi64(s[i + 1], s[i + 3]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    s[i] = _mm256_permute2x128_si256(r[i], r[i + 4], 0x20);
    s[i + 4] = _mm256_permute2x128_si256(r[i], r[i + 4], 0x31);
  }
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) r[i] = s[i];
}

// 8 rows x 4 steps a time where all is there: a row and the one four below it share a register from the load on, so 8
// shuffles do (20 cycles for 16 steps, 40 through transpose8). Gives the first step that is left.
inline int64_t whole_chunk(const uint8_t* const* row, int64_t k, uint32_t* out) noexcept {
  int64_t q = 0;
  for (; 2 * q + 32 <= k; q += 16)
#pragma GCC unroll 4
    for (int64_t j = q; j < q + 16; j += 4) {
      __m256i v[4];
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i)
        v[i] = _mm256_inserti128_si256(
            _mm256_castsi128_si256(
                _mm_loadu_si128(reinterpret_cast<const __m128i*>(row[i] + 4 * j))),
            _mm_loadu_si128(reinterpret_cast<const __m128i*>(row[i + 4] + 4 * j)), 1);
      const __m256i a = _mm256_unpacklo_epi32(v[0], v[1]), b = _mm256_unpackhi_epi32(v[0], v[1]),
                    c = _mm256_unpacklo_epi32(v[2], v[3]), d = _mm256_unpackhi_epi32(v[2], v[3]);
      auto* to = reinterpret_cast<__m256i*>(out + 8 * j);
      _mm256_storeu_si256(to, _mm256_unpacklo_epi64(a, c));
      _mm256_storeu_si256(to + 1, _mm256_unpackhi_epi64(a, c));
      _mm256_storeu_si256(to + 2, _mm256_unpacklo_epi64(b, d));
      _mm256_storeu_si256(to + 3, _mm256_unpackhi_epi64(b, d));
    }
  return q;
}

template <DType T>
void chunk(const WidenTables& t, const RowsSource& s, int64_t first, int64_t rows, bool for_amx,
           uint32_t* out) noexcept {
  constexpr int64_t kBytes = spec::dtype_bytes(T);
  const uint8_t* row[kAmxChunk];
  for (int64_t i = 0; i < rows; ++i)
    row[i] = static_cast<const uint8_t*>(s.x) +
             (s.index != nullptr ? s.index[first + i] : first + i) * s.ld * kBytes;
  const int64_t steps = packed_depth(DType::bf16, s.k) / 2;
  if (for_amx || rows == 1) {
    for (int64_t q = 0; q < steps; q += 16)
      for (int64_t i = 0; i < rows; ++i)
        _mm512_storeu_si512(out + q * rows + i * 16,
                            load_pairs<T>(t, row[i] + 2 * q * kBytes, s.k - 2 * q));
    return;
  }
  const __mmask8 mask = static_cast<__mmask8>(first_bits(rows));
  for (int64_t q = T == DType::bf16 && rows == 8 ? whole_chunk(row, s.k, out) : 0; q < steps;
       q += 16) {
    __m256i lo[8], hi[8];
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) {
      const __m512i v = i < rows ? load_pairs<T>(t, row[i] + 2 * q * kBytes, s.k - 2 * q)
                                 : _mm512_setzero_si512();
      lo[i] = _mm512_castsi512_si256(v), hi[i] = _mm512_extracti64x4_epi64(v, 1);
    }
    transpose8(lo);
    transpose8(hi);
    uint32_t* to = out + q * rows;
    if (q + 16 < steps || rows == 8) {  // what a store writes too far the next one writes again
#pragma GCC unroll 8
      for (int i = 0; i < 8; ++i)
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + i * rows), lo[i]);
#pragma GCC unroll 8
      for (int i = 0; i < 8; ++i)
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + (8 + i) * rows), hi[i]);
    } else {
#pragma GCC unroll 8
      for (int i = 0; i < 8; ++i) _mm256_mask_storeu_epi32(to + i * rows, mask, lo[i]);
#pragma GCC unroll 8
      for (int i = 0; i < 8; ++i) _mm256_mask_storeu_epi32(to + (8 + i) * rows, mask, hi[i]);
    }
  }
}

template <DType T>
void all(const RowsSource& s, bool for_amx, uint32_t* out, int64_t r0, int64_t r1) noexcept {
  const WidenTables t = load_widen_tables();
  const int64_t steps = packed_depth(DType::bf16, s.k) / 2, size = for_amx ? kAmxChunk : kChunk;
  for (int64_t r = r0; r < r1; r += size)
    chunk<T>(t, s, r, r1 - r < size ? r1 - r : size, for_amx, out + r * steps);
}

}  // namespace

void packed_rows_cpu_avx512bf16(const RowsSource& s, bool for_amx, uint32_t* out, int64_t r0,
                                int64_t r1) noexcept {
  if (s.type == DType::bf16) return all<DType::bf16>(s, for_amx, out, r0, r1);
  if (s.type == DType::f32) return all<DType::f32>(s, for_amx, out, r0, r1);
  all<DType::f8e4m3>(s, for_amx, out, r0, r1);
}

void packed_columns_cpu_avx512bf16(const uint16_t* src, int64_t ld, int64_t m, int64_t k,
                                   uint32_t* out) noexcept {
  constexpr int64_t kWide = 128, kFar = 32;  // columns at a time; of K asked for ahead
  const int64_t steps = packed_depth(DType::bf16, k) / 2;
  const PairsOfColumns pairs;
  for (int64_t r = 0; r < m; r += kWide)
    for (int64_t s = 0; s < steps; s += 2)  // a line of each chunk, written at once
      for (int64_t h = r; h < m && h < r + kWide; h += 32) {
        const uint16_t* p = src + 2 * s * ld + h;
        __m512i v[2][2];
#pragma GCC unroll 2
        for (int i = 0; i < 2; ++i) {
          _mm_prefetch(reinterpret_cast<const char*>(p + (kFar + 2 * i) * ld), _MM_HINT_T0);
          _mm_prefetch(reinterpret_cast<const char*>(p + (kFar + 2 * i + 1) * ld), _MM_HINT_T0);
          pairs.load(p + 2 * i * ld, ld, m - h, k - 2 * (s + i), v[i][0], v[i][1]);
        }
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) {
          const int64_t first = h + 8 * i, rows = m - first;
          const __m512i a = v[0][i / 2], b = v[1][i / 2];
          const __m512i line =
              i % 2 == 0 ? _mm512_shuffle_i64x2(a, b, 0x44) : _mm512_shuffle_i64x2(a, b, 0xee);
          uint32_t* to = out + first * steps + s * (rows < 8 ? rows : 8);
          if (rows >= 8) {
            _mm512_storeu_si512(to, line);
          } else if (rows > 0) {
            const auto mask = static_cast<__mmask8>(first_bits(rows));
            _mm256_mask_storeu_epi32(to, mask, _mm512_castsi512_si256(line));
            _mm256_mask_storeu_epi32(to + rows, mask, _mm512_extracti64x4_epi64(line, 1));
          }
        }
      }
}

void packed_weight_columns_cpu_avx512bf16(const PackSource& w, uint32_t* out, int64_t s0,
                                          int64_t s1) noexcept {
  const int64_t group = packed_depth(DType::bf16, w.k) / 2 * 16;
  const PairsOfColumns pairs;
  for (int64_t s = s0; s < s1; ++s) {
    const uint16_t* p = static_cast<const uint16_t*>(w.w) + 2 * s * w.ld;
    uint32_t* to = out + s * 16;
    for (int64_t n = 0; n < w.n; n += 32, to += 2 * group) {
      __m512i a, b;
      pairs.load(p + n, w.ld, w.n - n, w.k - 2 * s, a, b);
      _mm_prefetch(reinterpret_cast<const char*>(p + n + 16 * w.ld), _MM_HINT_T0);
      _mm_prefetch(reinterpret_cast<const char*>(p + n + 17 * w.ld), _MM_HINT_T0);
      _mm512_store_si512(to, a);
      if (n + 16 < w.n) _mm512_store_si512(to + group, b);
    }
  }
}

void packed_codes_cpu_avx512bf16(const PackSource& s, uint8_t* out, uint8_t* marks, int64_t g0,
                                 int64_t g1) noexcept {
  const int64_t depth = packed_depth(DType::f8e4m3, s.k), blocks = (s.k + 127) / 128;
  const auto* src = static_cast<const uint8_t*>(s.w);
  const auto bytes = [](int v) { return _mm512_set1_epi8(static_cast<char>(v)); };
  const __m512i order =
      _mm512_broadcast_i32x4(_mm_setr_epi8(0, 1, 4, 5, 8, 9, 12, 13, 2, 3, 6, 7, 10, 11, 14, 15));
  for (int64_t g = g0; g < g1; ++g) {
    const int64_t valid = s.n - g * 16;
    for (int64_t b = 0; b < blocks; ++b) marks[g * blocks + b] = 0;
    for (int64_t k = 0; k < depth; k += 64) {
      const auto mask = static_cast<__mmask64>(first_bits(s.k - k));
      __m512i r[16];
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i)
        r[i] = i < valid ? _mm512_maskz_loadu_epi8(mask, src + (g * 16 + i) * s.ld + k)
                         : _mm512_setzero_si512();
      transpose16(r);
      const int64_t lines = depth - k < 64 ? 8 : 16;
      uint8_t* to = out + (g * depth + k) * 16;
      __mmask64 marked = 0;
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i)
        if (i < lines) {
          const __m512i c = r[i];
          marked |= _mm512_testn_epi8_mask(c, bytes(0x78)) |
                    _mm512_cmpeq_epi8_mask(_mm512_and_si512(c, bytes(0x7f)), bytes(0x7f));
          const __m512i swapped = _mm512_ternarylogic_epi32(
              bytes(0x0f), _mm512_srli_epi16(c, 4), _mm512_slli_epi16(c, 4), 0xca);  // a ? b : c
          _mm512_storeu_si512(to + 64 * i, _mm512_shuffle_epi8(swapped, order));
        }
      if (marked != 0) marks[g * blocks + k / 128] = 1;
    }
  }
}

}  // namespace v3b::kern
