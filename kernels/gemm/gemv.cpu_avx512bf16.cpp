// Dot products along K with VDPBF16PS: both operands are contiguous there, so nothing is packed.
// Four weight rows at a time against up to six activation rows: 24 accumulators, 4 + 1 loads for 24
// dot steps; the four weight rows stay in L1 while further groups of activation rows go over them.
// One or two rows take eight weight rows at a time: four dot chains would wait for their own
// latency (6 cycles a step), and eight sums across lanes together cost three operations each.
// GCC 12 warns about the undefined registers inside its own AVX-512 headers (its bug 105593).
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include "kernels/gemm/gemv.h"

#include <immintrin.h>

namespace v3b::kern {
namespace {

constexpr int kRowsA = 6;
constexpr int64_t kStep = 32;  // bf16 in a register

inline __m512bh load(const spec::bf16* p) noexcept { return (__m512bh)_mm512_loadu_si512(p); }
inline __m512bh load_tail(const spec::bf16* p, __mmask32 mask) noexcept {
  return (__m512bh)_mm512_maskz_loadu_epi16(mask, p);
}

// In each 128-bit lane the sums of the four registers' lanes.
inline __m512 sum_lanes4(const __m512* v) noexcept {
  const __m512 a = _mm512_add_ps(_mm512_unpacklo_ps(v[0], v[1]), _mm512_unpackhi_ps(v[0], v[1]));
  const __m512 b = _mm512_add_ps(_mm512_unpacklo_ps(v[2], v[3]), _mm512_unpackhi_ps(v[2], v[3]));
  const __m512d ad = _mm512_castps_pd(a), bd = _mm512_castps_pd(b);
  return _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(ad, bd)),
                       _mm512_castpd_ps(_mm512_unpackhi_pd(ad, bd)));
}
// Sums of four and of eight registers; the same additions in the same order as of one, so that a
// result does not depend on how many rows were taken together.
inline void sums(const __m512 (&v)[4], float* out) noexcept {
  const __m512 q = sum_lanes4(v);
  const __m512 h = _mm512_add_ps(q, _mm512_shuffle_f32x4(q, q, 0xee));
  const __m256 l = _mm512_castps512_ps256(h);
  _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(l), _mm256_extractf128_ps(l, 1)));
}
inline void sums(const __m512 (&v)[8], float* out) noexcept {
  const __m512 q = sum_lanes4(v), r = sum_lanes4(v + 4);
  const __m512 h =
      _mm512_add_ps(_mm512_shuffle_f32x4(q, r, 0x44), _mm512_shuffle_f32x4(q, r, 0xee));
  const __m512 s =
      _mm512_add_ps(_mm512_shuffle_f32x4(h, h, 0x88), _mm512_shuffle_f32x4(h, h, 0xdd));
  _mm256_storeu_ps(out, _mm512_castps512_ps256(s));
}
inline void sums(const __m512 (&v)[1], float* out) noexcept {
  const __m512 four[4] = {v[0], v[0], v[0], v[0]};
  float same[4];
  sums(four, same);
  *out = same[0];
}

inline void put(const GemmArgs& g, int64_t m, int64_t n, float v) noexcept {
  if (g.c_type == spec::DType::bf16) {
    static_cast<spec::bf16*>(g.c)[m * g.ldc + n] = spec::to_bf16(v);
  } else {
    float* c = static_cast<float*>(g.c) + m * g.ldc + n;
    *c = g.accumulate ? *c + v : v;
  }
}

template <int MB, int NB>
void tile(const GemmArgs& g, int64_t m0, int64_t n0) noexcept {
  const auto* a = static_cast<const spec::bf16*>(g.a) + m0 * g.lda;
  const auto* b = static_cast<const spec::bf16*>(g.b) + n0 * g.ldb;
  __m512 acc[MB][NB];
  for (int i = 0; i < MB; ++i) {
    for (int j = 0; j < NB; ++j) acc[i][j] = _mm512_setzero_ps();
  }
  int64_t k = 0;
  for (; k + kStep <= g.K; k += kStep) {
    __m512bh vb[NB];
    for (int j = 0; j < NB; ++j) vb[j] = load(b + j * g.ldb + k);
    for (int i = 0; i < MB; ++i) {
      const __m512bh va = load(a + i * g.lda + k);
      for (int j = 0; j < NB; ++j) acc[i][j] = _mm512_dpbf16_ps(acc[i][j], va, vb[j]);
    }
  }
  if (k < g.K) {
    const __mmask32 mask = static_cast<__mmask32>((uint64_t{1} << (g.K - k)) - 1);
    __m512bh vb[NB];
    for (int j = 0; j < NB; ++j) vb[j] = load_tail(b + j * g.ldb + k, mask);
    for (int i = 0; i < MB; ++i) {
      const __m512bh va = load_tail(a + i * g.lda + k, mask);
      for (int j = 0; j < NB; ++j) acc[i][j] = _mm512_dpbf16_ps(acc[i][j], va, vb[j]);
    }
  }
  for (int i = 0; i < MB; ++i) {
    float total[NB];
    sums(acc[i], total);
    for (int j = 0; j < NB; ++j) put(g, m0 + i, n0 + j, total[j]);
  }
}

template <int NB>
void column(const GemmArgs& g, int64_t n0) noexcept {
  // Even groups: 8 rows as 4 + 4, not 6 + 2.
  const int64_t groups = (g.M + kRowsA - 1) / kRowsA;
  int64_t m = 0;
  for (int64_t i = 0; i < groups; ++i) {
    const int64_t rows = g.M * (i + 1) / groups - m;
    switch (rows) {
      case 1:
        tile<1, NB>(g, m, n0);
        break;
      case 2:
        tile<2, NB>(g, m, n0);
        break;
      case 3:
        tile<3, NB>(g, m, n0);
        break;
      case 4:
        tile<4, NB>(g, m, n0);
        break;
      case 5:
        tile<5, NB>(g, m, n0);
        break;
      default:
        tile<6, NB>(g, m, n0);
        break;
    }
    m += rows;
  }
}

}  // namespace

void gemv_rows_avx512bf16(const GemmArgs& g, int64_t n0, int64_t n1) noexcept {
  int64_t n = n0;
  if (g.M == 1) {
    for (; n + 8 <= n1; n += 8) tile<1, 8>(g, 0, n);
  } else if (g.M == 2) {
    for (; n + 8 <= n1; n += 8) tile<2, 8>(g, 0, n);
  }
  for (; n + 4 <= n1; n += 4) column<4>(g, n);
  for (; n < n1; ++n) column<1>(g, n);
}

}  // namespace v3b::kern
