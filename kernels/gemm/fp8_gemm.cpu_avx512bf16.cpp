// Block-scaled FP8 product with VDPBF16PS. E4M3 codes are widened to bf16 by two 128-entry byte
// tables (VPERMI2B, so AVX512_VBMI as well): exact for every code, subnormals and NaN included.
//
// The weights stream through once, dot products along K, six activation rows against two weight rows. Many rows are
// strips (strip.h).
// GCC 12 warns about the undefined registers inside its own AVX-512
// headers (its bug 105593).
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC target("avx512vbmi")
#include <immintrin.h>

#include "kernels/gemm/fp8.h"
#include "kernels/gemm/fp8_widen_avx512-inl.h"

namespace v3b::kern {
namespace {

using spec::bf16;
using spec::f8e4m3;

constexpr int64_t kBlock = 128;
constexpr int kRows = 6;
constexpr int64_t kAhead = 2048;  // bytes of weights to prefetch ahead

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
void gemv_tile(const spec::Fp8GemmArgs& g, const WidenTables& t, const bf16* a, int64_t kp,
               int64_t m0, int64_t n0) noexcept {
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

template <int NB>
void gemv_column(const spec::Fp8GemmArgs& g, const WidenTables& t, const bf16* a, int64_t kp,
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

}  // namespace

void fp8_widen_rows_avx512bf16(const f8e4m3* q, int64_t rows, int64_t k, int64_t kp,
                               bf16* out) noexcept {
  const WidenTables t = load_widen_tables();
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
  const WidenTables t = load_widen_tables();
  int64_t n = n0;
  for (; n + 2 <= n1; n += 2) gemv_column<2>(g, t, a, kp, n);
  for (; n < n1; ++n) gemv_column<1>(g, t, a, kp, n);
}

}  // namespace v3b::kern
