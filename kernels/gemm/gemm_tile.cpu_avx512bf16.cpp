// Tiles of bf16 pairs with VDPBF16PS (64 FLOP an instruction, one a cycle on Zen 4).
//
// Bound: R rows x V groups of 16 lanes are R*V accumulators; a step is V loads of Q (64 bytes each), R broadcast
// loads of P (4 bytes each) and R*V products. 6 x 4, 8 x 3, 12 x 2: 10, 11, 14 loads for 24 products, so the product
// port binds as long as Q comes from L2 at 256/24 = 11 bytes a cycle. Twelve chains cover the latency of 6 cycles.
// GCC 12 warns about the undefined registers inside its own AVX-512 headers (its bug 105593).
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>

#include "kernels/gemm/tile.h"

namespace v3b::kern {
namespace {

template <int R, int V, bool kUnit>
inline void micro(const TileArgs& t, int64_t r0, int64_t g0) noexcept {
  __m512 acc[R][V];
#pragma GCC unroll 24
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) acc[r][v] = _mm512_setzero_ps();
  const int64_t step = kUnit ? 1 : t.p_step, row = kUnit ? t.p_row : 1;
  const uint32_t* p = t.p + r0 * row;
  const uint32_t* q = t.q + g0 * t.q_group;
  for (int64_t s = 0; s < t.steps; ++s, p += step, q += 16) {
    __m512i b[V];
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) b[v] = _mm512_loadu_si512(q + v * t.q_group);
#pragma GCC unroll 24
    for (int r = 0; r < R; ++r) {
      uint32_t pair;
      __builtin_memcpy(&pair, p + r * row, 4);  // rows of odd length are not 4-byte aligned
      const __m512i a = _mm512_set1_epi32(static_cast<int>(pair));
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v)
        acc[r][v] = _mm512_dpbf16_ps(acc[r][v], (__m512bh)a, (__m512bh)b[v]);
    }
  }
#pragma GCC unroll 4
  for (int v = 0; v < V; ++v) {
    const int64_t l = (g0 + v) * 16, left = t.lanes - l;
    const __mmask16 mask = static_cast<__mmask16>(left >= 16 ? 0xffffu : (1u << left) - 1u);
    const __m512 scale = t.scale != nullptr ? _mm512_loadu_ps(t.scale + l) : _mm512_set1_ps(1.0F);
#pragma GCC unroll 24
    for (int r = 0; r < R; ++r) {
      float* c = t.c + (r0 + r) * t.ldc + l;
      __m512 sum = acc[r][v];
      if (t.scale != nullptr) {
        sum = t.add ? _mm512_fmadd_ps(sum, scale, _mm512_maskz_loadu_ps(mask, c))
                    : _mm512_mul_ps(sum, scale);
      } else if (t.add) {
        sum = _mm512_add_ps(sum, _mm512_maskz_loadu_ps(mask, c));
      }
      _mm512_mask_storeu_ps(c, mask, sum);
    }
  }
}

// R rows at a time against V groups.
template <int V, int R, bool kUnit>
int64_t strips(const TileArgs& t, int64_t r, int64_t g) noexcept {
  for (; r + R <= t.rows; r += R) micro<R, V, kUnit>(t, r, g);
  return r;
}

// A panel of V groups against all rows.
template <int V, bool kUnit>
void panel(const TileArgs& t, int64_t g) noexcept {
  int64_t r = 0;
  if constexpr (V <= 2) r = strips<V, 12, kUnit>(t, r, g);
  if constexpr (V <= 3) r = strips<V, 8, kUnit>(t, r, g);
  if constexpr (V == 4) r = strips<V, 6, kUnit>(t, r, g);
  r = strips<V, 4, kUnit>(t, r, g);
  r = strips<V, 2, kUnit>(t, r, g);
  strips<V, 1, kUnit>(t, r, g);
}

template <bool kUnit>
void all(const TileArgs& t) noexcept {
  const int64_t groups = (t.lanes + 15) / 16;
  int64_t g = 0;
  while (g < groups) {
    const int64_t left = groups - g;
    // 5 groups as 3 + 2, never 4 + 1.
    if (left == 4 || left > 5) {
      panel<4, kUnit>(t, g), g += 4;
    } else if (left == 5 || left == 3) {
      panel<3, kUnit>(t, g), g += 3;
    } else if (left == 2) {
      panel<2, kUnit>(t, g), g += 2;
    } else {
      panel<1, kUnit>(t, g), g += 1;
    }
  }
}

}  // namespace

void tile_cpu_avx512bf16(const TileArgs& t) noexcept {
  if (t.p_step == 1) return all<true>(t);
  all<false>(t);
}

}  // namespace v3b::kern
