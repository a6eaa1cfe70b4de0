// Operands of gemm_tile.cpu_avx512bf16.cpp. Rows into lanes: 16 rows x 32 elements a time through a transpose in
// registers, 64 shuffles for 512 elements; already k-major: two loads and a merge for 32. FP8 codes widen on the way
// (fp8_widen_avx512-inl.h), exactly.
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC target("avx512vbmi")
#include <immintrin.h>

#include "kernels/gemm/fp8_widen_avx512-inl.h"
#include "kernels/gemm/tile.h"
#include "kernels/gemm/transpose_avx512-inl.h"

namespace v3b::kern {
namespace {

using spec::DType;

inline int64_t row_of(const PackArgs& a, int64_t i) noexcept {
  return a.index != nullptr ? a.index[i] : i;
}

// 32 elements of a row from k on.
inline __m512i load_bf16(const uint16_t* row, int64_t k, int64_t left) noexcept {
  if (left >= 32) return _mm512_loadu_si512(row + k);
  if (left <= 0) return _mm512_setzero_si512();
  return _mm512_maskz_loadu_epi16(static_cast<__mmask32>((uint64_t{1} << left) - 1), row + k);
}
inline __m512i load_codes32(const WidenTables& t, const uint8_t* row, int64_t k,
                            int64_t left) noexcept {
  __m256i c;
  if (left >= 32) {
    c = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(row + k));
  } else if (left <= 0) {
    return _mm512_setzero_si512();
  } else {
    c = _mm256_maskz_loadu_epi8(static_cast<__mmask32>((uint64_t{1} << left) - 1), row + k);
  }
  __m512i first, second;
  widen_in_order(t, _mm512_castsi256_si512(c), first, second);
  return first;
}

template <bool kCodes>
void lanes_of_rows(const PackArgs& a) noexcept {
  const WidenTables t = load_widen_tables();
  const int64_t steps = tile_steps(TileForm::pairs, a.k);
  for (int64_t l = 0; l < a.count; l += 16) {
    uint32_t* out = a.out + l / 16 * a.out_group;
    const uint8_t* rows[16];
    const int64_t valid = a.count - l < 16 ? a.count - l : 16;
    for (int64_t i = 0; i < 16; ++i)
      rows[i] = i < valid ? static_cast<const uint8_t*>(a.src) +
                                row_of(a, l + i) * a.ld * (kCodes ? 1 : 2)
                          : nullptr;
    for (int64_t s = 0; s < steps; s += 16) {
      __m512i r[16];
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i) {
        if (i >= valid) {
          r[i] = _mm512_setzero_si512();
        } else if (kCodes) {
          r[i] = load_codes32(t, rows[i], 2 * s, a.k - 2 * s);
        } else {
          r[i] = load_bf16(reinterpret_cast<const uint16_t*>(rows[i]), 2 * s, a.k - 2 * s);
        }
      }
      transpose16(r);
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i) _mm512_storeu_si512(out + (s + i) * a.out_step, r[i]);
    }
  }
}

void lanes_of_k_major(const PackArgs& a) noexcept {
  const int64_t steps = tile_steps(TileForm::pairs, a.k);
  const auto* src = static_cast<const uint16_t*>(a.src);
  for (int64_t s = 0; s < steps; ++s) {
    const uint16_t* lo = src + 2 * s * a.ld;
    const uint16_t* hi = lo + a.ld;
    for (int64_t l = 0; l < a.count; l += 16) {
      const int64_t left = a.count - l;
      const __mmask16 mask = static_cast<__mmask16>(left >= 16 ? 0xffffu : (1u << left) - 1u);
      __m512i v = _mm512_setzero_si512();
      if (2 * s < a.k) v = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, lo + l));
      if (2 * s + 1 < a.k) {
        const __m512i h = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, hi + l));
        v = _mm512_or_si512(v, _mm512_slli_epi32(h, 16));
      }
      _mm512_storeu_si512(a.out + l / 16 * a.out_group + s * a.out_step, v);
    }
  }
}

}  // namespace

void tile_pack_lanes_cpu_avx512bf16(const PackArgs& a) noexcept {
  if (a.k_major) return lanes_of_k_major(a);
  if (a.type == DType::f8e4m3) return lanes_of_rows<true>(a);
  lanes_of_rows<false>(a);
}

void tile_pack_rows_cpu_avx512bf16(const PackArgs& a) noexcept {
  if (a.k_major) {  // [steps][count rounded up to 16]
    PackArgs b = a;
    b.out_group = 16;
    return lanes_of_k_major(b);
  }
  const WidenTables t = load_widen_tables();
  const int64_t end = 2 * tile_steps(TileForm::pairs, a.k);
  for (int64_t i = 0; i < a.count; ++i) {
    uint32_t* out = a.out + i * a.out_step;
    if (a.type == DType::f8e4m3) {
      const auto* row = static_cast<const uint8_t*>(a.src) + row_of(a, i) * a.ld;
      int64_t k = 0;
      for (; k + 64 <= a.k; k += 64) {
        __m512i first, second;
        // The block of K after this one: 48 rows are more streams than the hardware follows.
        _mm_prefetch(reinterpret_cast<const char*>(row + k + a.k), _MM_HINT_T0);
        widen_in_order(t, _mm512_loadu_si512(row + k), first, second);
        _mm512_storeu_si512(out + k / 2, first);
        _mm512_storeu_si512(out + k / 2 + 16, second);
      }
      for (; k < end; k += 32) _mm512_storeu_si512(out + k / 2, load_codes32(t, row, k, a.k - k));
    } else {
      const auto* row = static_cast<const uint16_t*>(a.src) + row_of(a, i) * a.ld;
      for (int64_t k = 0; k < end; k += 32)
        _mm512_storeu_si512(out + k / 2, load_bf16(row, k, a.k - k));
    }
  }
}

}  // namespace v3b::kern
