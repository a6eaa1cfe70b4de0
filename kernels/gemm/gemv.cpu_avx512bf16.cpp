// Few rows: dot products along K with VDPBF16PS, weights as they lie.
//
// Bound: at one row 64 bytes of weights are one product, memory binds; at eight rows 64 bytes are eight cycles of the
// product port, about what the memory takes (50 GB/s on two cores), so the two have to overlap. The latency of a product
// is about 15 cycles at 512 bits (8 chains reached 225 of 430 GFLOP/s), so 16 to 24 sums run side by side. Tiles of M x
// NB in registers: 4 + 6 loads for 24 products. The hardware's prefetch does not keep up with rows at a stride behind a
// loop that computes: the next tile's weights are asked for in L2, in the order in which they lie (4096-byte strides: 27,
// in order into L1: 24, in order into L2: 30 GB/s).
// GCC 12 warns about the undefined registers inside its own AVX-512 headers (its bug 105593).
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include "kernels/gemm/gemv.h"

#include <immintrin.h>

namespace v3b::kern {
namespace {

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
// Sums of four registers.
inline void sums(const __m512 (&v)[4], float* out) noexcept {
  const __m512 q = sum_lanes4(v);
  const __m512 h = _mm512_add_ps(q, _mm512_shuffle_f32x4(q, q, 0xee));
  const __m256 l = _mm512_castps512_ps256(h);
  _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(l), _mm256_extractf128_ps(l, 1)));
}
inline void put(const GemmArgs& g, int64_t m, int64_t n, float v) noexcept {
  if (g.c_type == spec::DType::bf16) {
    static_cast<spec::bf16*>(g.c)[m * g.ldc + n] = spec::to_bf16(v);
  } else {
    float* c = static_cast<float*>(g.c) + m * g.ldc + n;
    *c = g.accumulate ? *c + v : v;
  }
}

// MB x NB accumulators; A packed (gemv.h). The weights of the next tile, which lie behind this one's,
// are brought to L2 in the order in which they lie.
template <int MB, int NB>
inline void dots(const GemmArgs& g, const spec::bf16* a, int64_t m0, int64_t n) noexcept {
  const auto* b = static_cast<const spec::bf16*>(g.b) + n * g.ldb;
  const auto* next = reinterpret_cast<const char*>(b + NB * g.ldb);
  const int64_t step = g.M * kStep;
  __m512 acc[MB * NB];
#pragma GCC unroll 24
  for (int i = 0; i < MB * NB; ++i) acc[i] = _mm512_setzero_ps();
  a += m0 * kStep;
  int64_t k = 0;
  for (; k + kStep <= g.K; k += kStep, a += step) {
    __m512bh vb[NB];
#pragma GCC unroll 8
    for (int j = 0; j < NB; ++j) {
      if (m0 == 0) _mm_prefetch(next + (k * NB + j * kStep) * 2, _MM_HINT_T1);
      vb[j] = load(b + j * g.ldb + k);
    }
#pragma GCC unroll 8
    for (int i = 0; i < MB; ++i) {
      const __m512bh va = load(a + i * kStep);
#pragma GCC unroll 8
      for (int j = 0; j < NB; ++j) acc[i * NB + j] = _mm512_dpbf16_ps(acc[i * NB + j], va, vb[j]);
    }
  }
  if (k < g.K) {  // the packed rows end in zeros
    const __mmask32 mask = static_cast<__mmask32>((uint64_t{1} << (g.K - k)) - 1);
    for (int j = 0; j < NB; ++j) {
      const __m512bh vb = load_tail(b + j * g.ldb + k, mask);
      for (int i = 0; i < MB; ++i)
        acc[i * NB + j] = _mm512_dpbf16_ps(acc[i * NB + j], load(a + i * kStep), vb);
    }
  }
  float total[MB * NB + 3];
#pragma GCC unroll 6
  for (int i = 0; i < MB * NB; i += 4) {
    __m512 four[4];
    for (int q = 0; q < 4; ++q) four[q] = acc[i + q < MB * NB ? i + q : i];
    sums(four, total + i);
  }
  for (int i = 0; i < MB; ++i)
    for (int j = 0; j < NB; ++j) put(g, m0 + i, n + j, total[i * NB + j]);
}

// NB weight rows from n on, all groups of at most MB activation rows: even groups, 10 as 3 + 3 + 4; M is such
// that none is smaller than MB - 1.
template <int MB, int NB>
void dots_tile(const GemmArgs& g, const spec::bf16* a, int64_t n) noexcept {
  const int64_t groups = (g.M + MB - 1) / MB;
  for (int64_t i = 0; i < groups; ++i) {
    const int64_t m0 = g.M * i / groups, m = g.M * (i + 1) / groups - m0;
    if (m == MB) {
      dots<MB, NB>(g, a, m0, n);
    } else if constexpr (MB > 1) {
      dots<MB - 1, NB>(g, a, m0, n);
    }
  }
}

template <int MB, int NB>
void dots_rows(const GemmArgs& g, const spec::bf16* a, int64_t n0, int64_t n1) noexcept {
  int64_t n = n0;
  for (; n + NB <= n1; n += NB) dots_tile<MB, NB>(g, a, n);
  for (; n < n1; ++n) dots_tile<MB, 1>(g, a, n);
}

}  // namespace

void gemv_pack_avx512bf16(const GemmArgs& g, spec::bf16* out) noexcept {
  for (int64_t i = 0; i < g.M; ++i) {
    const auto* a = static_cast<const spec::bf16*>(g.a) + i * g.lda;
    int64_t k = 0;
    for (; k + kStep <= g.K; k += kStep)
      _mm512_storeu_si512(out + k * g.M + i * kStep, _mm512_loadu_si512(a + k));
    if (k < g.K) {
      const __mmask32 mask = static_cast<__mmask32>((uint64_t{1} << (g.K - k)) - 1);
      _mm512_storeu_si512(out + k * g.M + i * kStep, _mm512_maskz_loadu_epi16(mask, a + k));
    }
  }
}

// Measured at 7168 x 2048 from memory: M = 8 and 16 as groups of 4 with 6 weight rows 232 and 301 GFLOP/s, as 8 x 3
// 195 and 264, as 4 x 4 216 and 284.
void gemv_packed_avx512bf16(const GemmArgs& g, const spec::bf16* packed, int64_t n0,
                            int64_t n1) noexcept {
  if (g.M == 1) return dots_rows<1, 8>(g, packed, n0, n1);
  if (g.M == 2) return dots_rows<2, 8>(g, packed, n0, n1);
  if (g.M == 3) return dots_rows<3, 8>(g, packed, n0, n1);
  if (g.M == 5 || g.M == 6) return dots_rows<6, 4>(g, packed, n0, n1);
  dots_rows<4, 6>(g, packed, n0, n1);
}

}  // namespace v3b::kern
