// E4M3 codes to bf16 in registers, exact for every code (subnormals, zeros, NaN), for the files for AVX-512 with
// AVX512_VBMI: two 128-entry byte tables (VPERMI2B). Everything in an anonymous namespace on purpose.
#pragma once
#include <immintrin.h>

#include <cstdint>

namespace v3b::kern {
namespace {

// Made by the compiler: building them at run time took as long as a small expert's block of rows.
struct WidenBytes {
  uint8_t lo[128], hi[128];  // of the bf16 of codes 0..127
};
constexpr WidenBytes make_widen_bytes() noexcept {
  WidenBytes b{};
  for (int c = 0; c < 128; ++c) {
    const uint32_t e = static_cast<uint32_t>(c) >> 3, m = static_cast<uint32_t>(c) & 7u;
    uint32_t bits = ((e + 120u) << 7) | (m << 4);
    if (e == 0) {  // m * 2^-9: normalise
      bits = 0;
      if (m != 0) {
        const uint32_t top = m >= 4 ? 2 : m >= 2 ? 1 : 0;
        bits = ((118u + top) << 7) | ((m << (7 - top)) & 0x7fu);
      }
    }
    if (c == 127) bits = 0x7fc0u;
    b.lo[c] = static_cast<uint8_t>(bits);
    b.hi[c] = static_cast<uint8_t>(bits >> 8);
  }
  return b;
}
alignas(64) constexpr WidenBytes kWidenBytes = make_widen_bytes();

struct WidenTables {
  __m512i lo0, lo1, hi0, hi1;  // low and high byte of the bf16 of codes 0..63 and 64..127
  __m512i sign, order;
};

inline WidenTables load_widen_tables() noexcept {
  const WidenBytes& b = kWidenBytes;
  WidenTables t{_mm512_loadu_si512(b.lo),
                _mm512_loadu_si512(b.lo + 64),
                _mm512_loadu_si512(b.hi),
                _mm512_loadu_si512(b.hi + 64),
                _mm512_set1_epi8(static_cast<char>(0x80)),
                _mm512_setr_epi64(0, 4, 1, 5, 2, 6, 3, 7)};
  // Opaque: the compiler would load these constants again at every use, one 64-byte load a cycle.
  __asm__("" : "+v"(t.lo0), "+v"(t.lo1), "+v"(t.hi0), "+v"(t.hi1), "+v"(t.sign), "+v"(t.order));
  return t;
}

// 64 codes -> 2 x 32 bf16: of each 16 codes the first eight in `first`, the others in `second`.
inline void widen_unordered(const WidenTables& t, __m512i c, __m512i& first,
                            __m512i& second) noexcept {
  const __m512i lo = _mm512_permutex2var_epi8(t.lo0, c, t.lo1);
  __m512i hi = _mm512_permutex2var_epi8(t.hi0, c, t.hi1);
  hi = _mm512_ternarylogic_epi32(hi, c, t.sign, 0xf8);  // hi | (c & sign)
  first = _mm512_unpacklo_epi8(lo, hi);
  second = _mm512_unpackhi_epi8(lo, hi);
}
// The same in order: a quadword permutation before (a two-table byte permutation costs twice an unpack on Zen 4).
inline void widen_in_order(const WidenTables& t, __m512i codes, __m512i& first,
                           __m512i& second) noexcept {
  widen_unordered(t, _mm512_permutexvar_epi64(t.order, codes), first, second);
}

}  // namespace
}  // namespace v3b::kern
