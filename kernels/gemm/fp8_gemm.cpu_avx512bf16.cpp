// Block-scaled FP8 product with VDPBF16PS. E4M3 codes are widened to bf16 by two 128-entry byte
// tables (VPERMI2B, so AVX512_VBMI as well): exact for every code, subnormals and NaN included.
//
// Few rows (gemv): the weights stream through once, dot products along K, six activation rows
// against two weight rows, or one against eight (twice as many streams keep the memory busy). More
// rows (tile): 64 weight rows x 128 of K are widened into a packed panel [k pair][64 columns] of 16
// KiB that stays in L1; six activation rows x 64 columns are summed in 24 registers over the
// 128-long segment, then scaled and added to an fp32 tile of C in L2. Packing costs ~9 operations
// for 64 codes, used m times. GCC 12 warns about the undefined registers inside its own AVX-512
// headers (its bug 105593).
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC target("avx512vbmi")
#include <immintrin.h>

#include "kernels/gemm/fp8.h"

namespace v3b::kern {
namespace {

using spec::bf16;
using spec::f8e4m3;

constexpr int64_t kBlock = 128;
constexpr int kRows = 6;
constexpr int64_t kAhead = 2048;  // bytes of weights to prefetch ahead

// Byte tables and orders, made by the compiler: building them at run time took as long as a small
// expert's block of rows.
struct Bytes {
  uint8_t lo[128], hi[128];  // of the bf16 of codes 0..127
  uint8_t first[64], second[64];
};
constexpr Bytes make_bytes() noexcept {
  Bytes b{};
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
  for (int i = 0; i < 32; ++i) {
    // Of each dword of four codes, the first two, then the last two.
    const int f = i / 2 * 4 + i % 2, s = f + 2;
    b.first[2 * i] = static_cast<uint8_t>(f), b.first[2 * i + 1] = static_cast<uint8_t>(64 + f);
    b.second[2 * i] = static_cast<uint8_t>(s), b.second[2 * i + 1] = static_cast<uint8_t>(64 + s);
  }
  return b;
}
alignas(64) constexpr Bytes kBytes = make_bytes();

struct Tables {
  __m512i lo0, lo1, hi0, hi1;  // low and high byte of the bf16 of codes 0..63 and 64..127
  __m512i sign;
  __m512i first, second;  // where the bytes of the two result registers come from
};

inline Tables load_tables() noexcept {
  const Bytes& b = kBytes;
  Tables t{_mm512_loadu_si512(b.lo),
           _mm512_loadu_si512(b.lo + 64),
           _mm512_loadu_si512(b.hi),
           _mm512_loadu_si512(b.hi + 64),
           _mm512_set1_epi8(static_cast<char>(0x80)),
           _mm512_loadu_si512(b.first),
           _mm512_loadu_si512(b.second)};
  // Opaque: the compiler would load these constants again at every use, one 64-byte load a cycle.
  __asm__("" : "+v"(t.lo0), "+v"(t.lo1), "+v"(t.hi0), "+v"(t.hi1));
  __asm__("" : "+v"(t.sign), "+v"(t.first), "+v"(t.second));
  return t;
}

// 64 codes -> 2 x 32 bf16, pair by pair.
inline void widen(const Tables& t, __m512i codes, __m512i& first, __m512i& second) noexcept {
  const __m512i lo = _mm512_permutex2var_epi8(t.lo0, codes, t.lo1);
  __m512i hi = _mm512_permutex2var_epi8(t.hi0, codes, t.hi1);
  hi = _mm512_ternarylogic_epi32(hi, codes, t.sign, 0xf8);  // hi | (codes & sign)
  first = _mm512_permutex2var_epi8(lo, t.first, hi);
  second = _mm512_permutex2var_epi8(lo, t.second, hi);
}

// The same in order, cheaper: a two-table byte permutation costs twice an unpack (Zen 4), so the
// bytes are brought together by a quadword permutation before and two unpacks after the tables.
inline void widen_in_order(const Tables& t, __m512i codes, __m512i& first,
                           __m512i& second) noexcept {
  const __m512i c = _mm512_permutexvar_epi64(_mm512_setr_epi64(0, 4, 1, 5, 2, 6, 3, 7), codes);
  const __m512i lo = _mm512_permutex2var_epi8(t.lo0, c, t.lo1);
  __m512i hi = _mm512_permutex2var_epi8(t.hi0, c, t.hi1);
  hi = _mm512_ternarylogic_epi32(hi, c, t.sign, 0xf8);
  first = _mm512_unpacklo_epi8(lo, hi);
  second = _mm512_unpackhi_epi8(lo, hi);
}

inline __m512i load_codes(const f8e4m3* p, int64_t valid) noexcept {
  if (valid >= 64) return _mm512_loadu_si512(p);
  if (valid <= 0) return _mm512_setzero_si512();
  return _mm512_maskz_loadu_epi8((uint64_t{1} << valid) - 1, p);
}

inline __m512 dot(__m512 acc, __m512i a, __m512i b) noexcept {
  return _mm512_dpbf16_ps(acc, (__m512bh)a, (__m512bh)b);
}

inline void put(const spec::Fp8GemmArgs& g, int64_t i, int64_t n, float v) noexcept {
  if (g.c_type == spec::DType::bf16) {
    static_cast<bf16*>(g.c)[i * g.n + n] = spec::to_bf16(v);
  } else {
    static_cast<float*>(g.c)[i * g.n + n] = v;
  }
}

template <int MB, int NB>
void gemv_tile(const spec::Fp8GemmArgs& g, const Tables& t, const bf16* a, int64_t kp, int64_t m0,
               int64_t n0) noexcept {
  const int64_t kb = kp / kBlock;
  __m512 acc[MB][NB];
  for (int i = 0; i < MB; ++i) {
    for (int j = 0; j < NB; ++j) acc[i][j] = _mm512_setzero_ps();
  }
  for (int64_t b = 0; b < kb; ++b) {
    __m512i w[NB][4];
    float sb[NB];
    for (int j = 0; j < NB; ++j) {
      const f8e4m3* q = g.qb + (n0 + j) * g.k + b * kBlock;
      const int64_t left = g.k - b * kBlock;
      // The rows lie one behind the other, but pages end every 4 KiB and the hardware's prefetch
      // with them.
      _mm_prefetch(reinterpret_cast<const char*>(q) + kAhead, _MM_HINT_T0);
      _mm_prefetch(reinterpret_cast<const char*>(q) + kAhead + 64, _MM_HINT_T0);
      widen_in_order(t, load_codes(q, left), w[j][0], w[j][1]);
      widen_in_order(t, load_codes(q + 64, left - 64), w[j][2], w[j][3]);
      sb[j] = g.sb[(n0 + j) / kBlock * kb + b];
    }
    for (int i = 0; i < MB; ++i) {
      const bf16* row = a + (m0 + i) * kp + b * kBlock;
      __m512 part[NB];
      for (int j = 0; j < NB; ++j) part[j] = _mm512_setzero_ps();
      for (int s = 0; s < 4; ++s) {
        const __m512i va = _mm512_loadu_si512(row + 32 * s);
        for (int j = 0; j < NB; ++j) part[j] = dot(part[j], va, w[j][s]);
      }
      const float sa = g.sa[(m0 + i) * kb + b];
      for (int j = 0; j < NB; ++j) {
        acc[i][j] = _mm512_fmadd_ps(part[j], _mm512_set1_ps(sa * sb[j]), acc[i][j]);
      }
    }
  }
  for (int i = 0; i < MB; ++i) {
    for (int j = 0; j < NB; ++j) put(g, m0 + i, n0 + j, _mm512_reduce_add_ps(acc[i][j]));
  }
}

// One activation row: it stays in registers for a block while NB weight rows go by; the same sums
// in the same order as gemv_tile.
template <int NB>
void gemv_row(const spec::Fp8GemmArgs& g, const Tables& t, const bf16* a, int64_t kp,
              int64_t n0) noexcept {
  const int64_t kb = kp / kBlock;
  __m512 acc[NB];
  for (int j = 0; j < NB; ++j) acc[j] = _mm512_setzero_ps();
  for (int64_t b = 0; b < kb; ++b) {
    const bf16* row = a + b * kBlock;
    const __m512i a0 = _mm512_loadu_si512(row), a1 = _mm512_loadu_si512(row + 32),
                  a2 = _mm512_loadu_si512(row + 64), a3 = _mm512_loadu_si512(row + 96);
    const int64_t left = g.k - b * kBlock;
    for (int j = 0; j < NB; ++j) {
      const f8e4m3* q = g.qb + (n0 + j) * g.k + b * kBlock;
      __m512i c0, c1, w0, w1;
      if (left >= kBlock) {
        c0 = _mm512_loadu_si512(q), c1 = _mm512_loadu_si512(q + 64);
      } else {
        c0 = load_codes(q, left), c1 = load_codes(q + 64, left - 64);
      }
      widen_in_order(t, c0, w0, w1);
      __m512 part = dot(dot(_mm512_setzero_ps(), a0, w0), a1, w1);
      widen_in_order(t, c1, w0, w1);
      part = dot(dot(part, a2, w0), a3, w1);
      acc[j] =
          _mm512_fmadd_ps(part, _mm512_set1_ps(g.sa[b] * g.sb[(n0 + j) / kBlock * kb + b]), acc[j]);
    }
  }
  for (int j = 0; j < NB; ++j) put(g, 0, n0 + j, _mm512_reduce_add_ps(acc[j]));
}

template <int NB>
void gemv_column(const spec::Fp8GemmArgs& g, const Tables& t, const bf16* a, int64_t kp,
                 int64_t n0) noexcept {
  const int64_t groups = (g.m + kRows - 1) / kRows;
  int64_t m = 0;
  for (int64_t i = 0; i < groups; ++i) {
    const int64_t rows = g.m * (i + 1) / groups - m;
    switch (rows) {
      case 1:
        gemv_tile<1, NB>(g, t, a, kp, m, n0);
        break;
      case 2:
        gemv_tile<2, NB>(g, t, a, kp, m, n0);
        break;
      case 3:
        gemv_tile<3, NB>(g, t, a, kp, m, n0);
        break;
      case 4:
        gemv_tile<4, NB>(g, t, a, kp, m, n0);
        break;
      case 5:
        gemv_tile<5, NB>(g, t, a, kp, m, n0);
        break;
      default:
        gemv_tile<6, NB>(g, t, a, kp, m, n0);
        break;
    }
    m += rows;
  }
}

// 16 rows of 64 codes -> 16 registers: register q holds codes 4q..4q+3 of all 16 rows.
inline void transpose(__m512i r[16]) noexcept {
  __m512i s[16];
  for (int i = 0; i < 16; i += 2) {
    s[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
    s[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    r[i] = _mm512_unpacklo_epi64(s[i], s[i + 2]);
    r[i + 1] = _mm512_unpackhi_epi64(s[i], s[i + 2]);
    r[i + 2] = _mm512_unpacklo_epi64(s[i + 1], s[i + 3]);
    r[i + 3] = _mm512_unpackhi_epi64(s[i + 1], s[i + 3]);
  }
  for (int i = 0; i < 4; ++i) {
    s[i] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88);
    s[i + 4] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xdd);
    s[i + 8] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0x88);
    s[i + 12] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0xdd);
  }
  for (int i = 0; i < 4; ++i) {
    r[i] = _mm512_shuffle_i32x4(s[i], s[i + 8], 0x88);
    r[i + 8] = _mm512_shuffle_i32x4(s[i], s[i + 8], 0xdd);
    r[i + 4] = _mm512_shuffle_i32x4(s[i + 4], s[i + 12], 0x88);
    r[i + 12] = _mm512_shuffle_i32x4(s[i + 4], s[i + 12], 0xdd);
  }
}

// Weight rows n0..n0+63 (zero past n), K block b -> panel [64 pairs][4][16 columns][2] of bf16.
void pack(const spec::Fp8GemmArgs& g, const Tables& t, int64_t n0, int64_t b,
          __m512i* panel) noexcept {
  for (int group = 0; group < 4; ++group) {
    for (int half = 0; half < 2; ++half) {
      const int64_t k0 = b * kBlock + 64 * half;
      __m512i r[16];
      for (int i = 0; i < 16; ++i) {
        const int64_t n = n0 + 16 * group + i;
        r[i] = n < g.n ? load_codes(g.qb + n * g.k + k0, g.k - k0) : _mm512_setzero_si512();
      }
      transpose(r);
      for (int q = 0; q < 16; ++q) {
        __m512i* at = panel + (32 * half + 2 * q) * 4 + group;
        widen(t, r[q], at[0], at[4]);
      }
    }
  }
}

template <int MB>
void tile(const bf16* a, int64_t kp, const __m512i* panel, const float* sa, int64_t sa_stride,
          float sb, bool first, float* c) noexcept {
  __m512 acc[MB][4];
  for (int i = 0; i < MB; ++i) {
    for (int j = 0; j < 4; ++j) acc[i][j] = _mm512_setzero_ps();
  }
  for (int p = 0; p < 64; ++p) {
    const __m512i b0 = panel[4 * p], b1 = panel[4 * p + 1], b2 = panel[4 * p + 2],
                  b3 = panel[4 * p + 3];
    for (int i = 0; i < MB; ++i) {
      int32_t pair;
      __builtin_memcpy(&pair, a + i * kp + 2 * p, 4);
      const __m512i va = _mm512_set1_epi32(pair);
      acc[i][0] = dot(acc[i][0], va, b0);
      acc[i][1] = dot(acc[i][1], va, b1);
      acc[i][2] = dot(acc[i][2], va, b2);
      acc[i][3] = dot(acc[i][3], va, b3);
    }
  }
  for (int i = 0; i < MB; ++i) {
    const __m512 s = _mm512_set1_ps(sa[i * sa_stride] * sb);
    for (int j = 0; j < 4; ++j) {
      float* at = c + i * kFp8TileN + 16 * j;
      const __m512 old = first ? _mm512_setzero_ps() : _mm512_load_ps(at);
      _mm512_store_ps(at, _mm512_fmadd_ps(acc[i][j], s, old));
    }
  }
}

}  // namespace

void fp8_widen_rows_avx512bf16(const f8e4m3* q, int64_t rows, int64_t k, int64_t kp,
                               bf16* out) noexcept {
  const Tables t = load_tables();
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t c = 0; c < kp; c += 64) {
      __m512i first, second;
      widen_in_order(t, load_codes(q + i * k + c, k - c), first, second);
      _mm512_storeu_si512(out + i * kp + c, first);
      _mm512_storeu_si512(out + i * kp + c + 32, second);
    }
  }
}

void fp8_gemv_avx512bf16(const spec::Fp8GemmArgs& g, const bf16* a, int64_t kp, int64_t n0,
                         int64_t n1) noexcept {
  const Tables t = load_tables();
  int64_t n = n0;
  if (g.m == 1) {
    for (; n + 8 <= n1; n += 8) gemv_row<8>(g, t, a, kp, n);
  }
  for (; n + 2 <= n1; n += 2) gemv_column<2>(g, t, a, kp, n);
  for (; n < n1; ++n) gemv_column<1>(g, t, a, kp, n);
}

void fp8_tile_avx512bf16(const spec::Fp8GemmArgs& g, const bf16* a, int64_t kp, int64_t n0,
                         int64_t m0, int64_t m1, void* scratch) noexcept {
  const Tables t = load_tables();
  auto* panel = static_cast<__m512i*>(scratch);
  float* c = reinterpret_cast<float*>(static_cast<char*>(scratch) + 64 * 64 * 4);
  const int64_t kb = kp / kBlock;
  for (int64_t b = 0; b < kb; ++b) {
    pack(g, t, n0, b, panel);
    const float sb = g.sb[n0 / kBlock * kb + b];
    for (int64_t m = m0; m < m1; m += kRows) {
      const bf16* rows = a + m * kp + b * kBlock;
      const float* sa = g.sa + m * kb + b;
      float* out = c + (m - m0) * kFp8TileN;
      switch (m1 - m) {
        case 1:
          tile<1>(rows, kp, panel, sa, kb, sb, b == 0, out);
          break;
        case 2:
          tile<2>(rows, kp, panel, sa, kb, sb, b == 0, out);
          break;
        case 3:
          tile<3>(rows, kp, panel, sa, kb, sb, b == 0, out);
          break;
        case 4:
          tile<4>(rows, kp, panel, sa, kb, sb, b == 0, out);
          break;
        case 5:
          tile<5>(rows, kp, panel, sa, kb, sb, b == 0, out);
          break;
        default:
          tile<6>(rows, kp, panel, sa, kb, sb, b == 0, out);
          break;
      }
    }
  }
  const int64_t columns = g.n - n0 < kFp8TileN ? g.n - n0 : kFp8TileN;
  for (int64_t m = m0; m < m1; ++m) {
    const float* row = c + (m - m0) * kFp8TileN;
    for (int64_t j = 0; j < columns; ++j) put(g, m, n0 + j, row[j]);
  }
}

}  // namespace v3b::kern
