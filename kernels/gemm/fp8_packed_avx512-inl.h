// FP8 codes of a packed weight (packed_weight.h) to pairs of bf16, for the files for AVX-512 with AVX512_VBMI. The values
// come out times 2^-8 (kPackedCodeScale undoes it with the scales). Everything in an anonymous namespace on purpose.
//
// A packed code is the bits s e0 m2 m1 m0 e3 e2 e1 of its E4M3 form s e3 e2 e1 e0 m2 m1 m0, so that both bytes of its bf16
// are eight neighbouring bits of the line: one VPMULTISHIFTQB brings 32 codes into place, one ternary masks and adds 112
// to the exponents. That is 4 operations for 64 codes (2 of them shuffles) where tables need 5 with 6 shuffle slots. It is
// exact for normal numbers only: blocks that hold zeros, subnormals or NaN are marked (packed_code_marks) and take tables.
#pragma once
#include <immintrin.h>

#include <cstdint>

namespace v3b::kern {
namespace {

struct PackedCodeBytes {
  uint8_t lo[128], hi[128];  // of the bf16 of the packed codes without sign
};
constexpr PackedCodeBytes make_packed_code_bytes() noexcept {
  PackedCodeBytes b{};
  for (uint32_t c = 0; c < 128; ++c) {
    const uint32_t e = (c & 7u) << 1 | c >> 6, m = c >> 3 & 7u;
    uint32_t bits = ((e + 112u) << 7) | (m << 4);
    if (e == 0) {  // m * 2^-9 * 2^-8: normalise
      bits = 0;
      if (m != 0) {
        const uint32_t top = m >= 4 ? 2 : m >= 2 ? 1 : 0;
        bits = ((110u + top) << 7) | ((m << (7 - top)) & 0x7fu);
      }
    }
    if (e == 15 && m == 7) bits = 0x7fc0u;
    b.lo[c] = static_cast<uint8_t>(bits);
    b.hi[c] = static_cast<uint8_t>(bits >> 8);
  }
  return b;
}
alignas(64) constexpr PackedCodeBytes kPackedCodeBytes = make_packed_code_bytes();

struct CodeShifts {
  __m512i first, second, mask, exponent;
};
inline CodeShifts load_code_shifts() noexcept {
  CodeShifts s{_mm512_set1_epi64(0x2827201f0807003f), _mm512_set1_epi64(0x3837302f1817100f),
               _mm512_set1_epi16(static_cast<short>(0x87f0)), _mm512_set1_epi16(0x3800)};
  __asm__("" : "+v"(s.first), "+v"(s.second), "+v"(s.mask), "+v"(s.exponent));  // stay in registers
  return s;
}

// A line of 16 outputs x 4 codes: their pairs (0, 1) and (2, 3).
inline void widen_normal(const CodeShifts& s, __m512i line, __m512i& first,
                         __m512i& second) noexcept {
  first = _mm512_ternarylogic_epi32(_mm512_multishift_epi64_epi8(s.first, line), s.mask, s.exponent,
                                    0xea);  // (a & b) | c
  second = _mm512_ternarylogic_epi32(_mm512_multishift_epi64_epi8(s.second, line), s.mask,
                                     s.exponent, 0xea);
}
// Every code; `t` is &kPackedCodeBytes, opaque to the compiler, so that the tables stay in memory.
inline void widen_any(const PackedCodeBytes* t, __m512i line, __m512i& first,
                      __m512i& second) noexcept {
  // Pairs (0, 1) of four outputs, then their pairs (2, 3): what the unpacks take apart.
  const __m512i c = _mm512_shuffle_epi8(
      line,
      _mm512_broadcast_i32x4(_mm_setr_epi8(0, 1, 4, 5, 8, 9, 12, 13, 2, 3, 6, 7, 10, 11, 14, 15)));
  const __m512i lo =
      _mm512_permutex2var_epi8(_mm512_loadu_si512(t->lo), c, _mm512_loadu_si512(t->lo + 64));
  __m512i hi =
      _mm512_permutex2var_epi8(_mm512_loadu_si512(t->hi), c, _mm512_loadu_si512(t->hi + 64));
  hi = _mm512_ternarylogic_epi32(hi, c, _mm512_set1_epi8(static_cast<char>(0x80)), 0xf8);
  first = _mm512_unpacklo_epi8(lo, hi);
  second = _mm512_unpackhi_epi8(lo, hi);
}
inline const PackedCodeBytes* packed_code_tables() noexcept {
  const PackedCodeBytes* t = &kPackedCodeBytes;
  __asm__("" : "+r"(t));
  return t;
}

}  // namespace
}  // namespace v3b::kern
