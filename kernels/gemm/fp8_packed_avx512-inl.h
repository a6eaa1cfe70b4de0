// FP8 codes of a packed weight (packed_weight.h) to pairs of bf16, for the files for AVX-512 with AVX512_VBMI. The values
// come out times 2^-8 (kPackedCodeScale undoes it with the scales). Everything in an anonymous namespace on purpose.
//
// A packed code is its E4M3 form with the nibbles exchanged: e0 m2 m1 m0 s e3 e2 e1. So the low byte of its bf16 is the
// code masked and the high byte a table of 16 entries (one VPERMB); two unpacks bring the bytes together. Those four
// operations a line of 64 codes issue on the pipes that VDPBF16PS leaves free, where VPMULTISHIFTQB (and GF2P8AFFINEQB, VPSHLDW,
// VPROLD) each takes one of its slots on Zen 4 (measured: 24 products and 6 of them 30 cycles, with VPERMB, VPSHUFB, unpacks
// or VPSLLW 24). Exact for normal numbers only: blocks that hold zeros, subnormals or NaN are marked
// (packed_code_marks) and take tables of all codes.
#pragma once
#include <immintrin.h>

#include <cstdint>

namespace v3b::kern {
namespace {

struct PackedCodeBytes {
  uint8_t lo[128], hi[128];  // of the bf16 of the codes without sign
};
constexpr PackedCodeBytes make_packed_code_bytes() noexcept {
  PackedCodeBytes b{};
  for (uint32_t c = 0; c < 128; ++c) {
    const uint32_t e = c >> 3, m = c & 7u;
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

struct CodeHigh {
  __m512i high, mask;
};
inline CodeHigh load_code_high() noexcept {
  // Of s e3 e2 e1: s 0111 e3 e2 e1.
  CodeHigh s{_mm512_broadcast_i32x4(_mm_setr_epi8(
                 0x38, 0x39, 0x3a, 0x3b, 0x3c, 0x3d, 0x3e, 0x3f, static_cast<char>(0xb8),
                 static_cast<char>(0xb9), static_cast<char>(0xba), static_cast<char>(0xbb),
                 static_cast<char>(0xbc), static_cast<char>(0xbd), static_cast<char>(0xbe),
                 static_cast<char>(0xbf))),
             _mm512_set1_epi8(static_cast<char>(0xf0))};
  __asm__("" : "+v"(s.high), "+v"(s.mask));  // stay in registers
  return s;
}

// A line of 16 outputs x 4 codes: their pairs (0, 1) and (2, 3).
inline __m512i widen_first(const CodeHigh& s, __m512i line) noexcept {
  return _mm512_unpacklo_epi8(_mm512_and_si512(line, s.mask),
                              _mm512_permutexvar_epi8(line, s.high));
}
inline __m512i widen_second(const CodeHigh& s, __m512i line) noexcept {
  return _mm512_unpackhi_epi8(_mm512_and_si512(line, s.mask),
                              _mm512_permutexvar_epi8(line, s.high));
}
// Every code; `t` is &kPackedCodeBytes, opaque to the compiler, so that the tables stay in memory.
inline void widen_any(const PackedCodeBytes* t, __m512i line, __m512i& first,
                      __m512i& second) noexcept {
  const __m512i c = _mm512_ternarylogic_epi32(_mm512_set1_epi8(0x0f), _mm512_srli_epi16(line, 4),
                                              _mm512_slli_epi16(line, 4), 0xca);  // a ? b : c
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
