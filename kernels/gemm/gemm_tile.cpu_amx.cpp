// Tiles of bf16 pairs with AMX: C (16 rows x 16 lanes) += P (16 rows x 32 of K, as it lies) x Q (16 steps x 16 lanes).
//
// Bound: TDPBF16PS on full tiles is 16 cycles (32768 FLOP); two P tiles against two Q tiles are four products of 64
// cycles for four tile loads of 16 lines (8 cycles each from L1, and 4 KiB of operands): the load ports are half
// busy. One group of lanes left over takes four P tiles (5 loads for 4 products). A row tail is a tile of fewer rows,
// a lane tail is padded in Q; steps are padded to 16 in both (TileArgs). Sums leave through a stored tile and are
// scaled and added with AVX-512: 16 loads, adds and stores for a tile, next to 16 cycles a step of 32.
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>

#include "kernels/core/amx.h"
#include "kernels/gemm/amx_products-inl.h"
#include "kernels/gemm/tile.h"

#if defined(V3B_AMX_EMULATE) || defined(__AMX_TILE__)
namespace v3b::kern {
namespace {

// Tiles 0-3: C; 4, 5: P; 6, 7: Q.
void put(const TileArgs& t, const float* tile, int64_t r0, int64_t rows, int64_t g) noexcept {
  const int64_t l = g * 16, left = t.lanes - l;
  const __mmask16 mask = static_cast<__mmask16>(left >= 16 ? 0xffffu : (1u << left) - 1u);
  const __m512 scale = t.scale != nullptr ? _mm512_loadu_ps(t.scale + l) : _mm512_set1_ps(1.0F);
  for (int64_t r = 0; r < rows; ++r) {
    float* c = t.c + (r0 + r) * t.ldc + l;
    __m512 sum = _mm512_load_ps(tile + 16 * r);
    if (t.add) {
      sum = _mm512_fmadd_ps(sum, scale, _mm512_maskz_loadu_ps(mask, c));
    } else {
      sum = _mm512_mul_ps(sum, scale);
    }
    _mm512_mask_storeu_ps(c, mask, sum);
  }
}

// Rows [r, r + 32) or, in the tail, [r, r + first) and [r + first, r + first + second); groups g and g + 1.
void wide(const TileArgs& t, int64_t r, int64_t first, int64_t second, int64_t g,
          Sums& s) noexcept {
  const uint32_t* p0 = t.p + r * t.p_row;
  const uint32_t* p1 = p0 + first * t.p_row;
  const uint32_t* q0 = t.q + g * t.q_group;
  product_2x2({p0, 16}, {p1, 16}, t.p_row * 4, q0, q0 + t.q_group, t.steps, s);
  put(t, s.tile[0], r, first, g);
  put(t, s.tile[1], r, first, g + 1);
  put(t, s.tile[2], r + first, second, g);
  put(t, s.tile[3], r + first, second, g + 1);
}

// One P tile against two groups, or one (q1 unused).
void narrow(const TileArgs& t, int64_t r, int64_t rows, int64_t g, bool two, Sums& s) noexcept {
  const uint32_t* p = t.p + r * t.p_row;
  const uint32_t* q = t.q + g * t.q_group;
  amx::zero<0>();
  amx::zero<1>();
  for (int64_t k = 0; k < t.steps; k += 16) {
    amx::load<4>(p + k, t.p_row * 4);
    amx::load<6>(q + k * 16, 64);
    amx::dpbf16<0, 4, 6>();
    if (two) {
      amx::load<7>(q + t.q_group + k * 16, 64);
      amx::dpbf16<1, 4, 7>();
    }
  }
  amx::store<0>(s.tile[0], 64);
  put(t, s.tile[0], r, rows, g);
  if (two) {
    amx::store<1>(s.tile[1], 64);
    put(t, s.tile[1], r, rows, g + 1);
  }
}

// Four P tiles of 16 rows against one group.
void tall(const TileArgs& t, int64_t r, int64_t g, Sums& s) noexcept {
  const uint32_t* p = t.p + r * t.p_row;
  const uint32_t* q = t.q + g * t.q_group;
  const int64_t tile = 16 * t.p_row;
  zero_sums();
  for (int64_t k = 0; k < t.steps; k += 16) {
    amx::load<6>(q + k * 16, 64);
    amx::load<4>(p + k, t.p_row * 4);
    amx::dpbf16<0, 4, 6>();
    amx::load<5>(p + tile + k, t.p_row * 4);
    amx::dpbf16<1, 5, 6>();
    amx::load<4>(p + 2 * tile + k, t.p_row * 4);
    amx::dpbf16<2, 4, 6>();
    amx::load<5>(p + 3 * tile + k, t.p_row * 4);
    amx::dpbf16<3, 5, 6>();
  }
  store_sums(s);
  for (int i = 0; i < 4; ++i) put(t, s.tile[i], r + 16 * i, 16, g);
}

// Tiles of `first` rows (C 0, 1 and P 4) and of `second` rows (C 2, 3 and P 5); 0 means the tile is not used.
void configure(int first, int second) noexcept {
  amx::Config c;
  c.tile(0, first, 64), c.tile(1, first, 64), c.tile(4, first, 64);
  if (second > 0) c.tile(2, second, 64), c.tile(3, second, 64), c.tile(5, second, 64);
  c.tile(6, 16, 64), c.tile(7, 16, 64);
  amx::configure(c);
}

}  // namespace

void V3B_AMX_ENTRY(tile_cpu_amx)(const TileArgs& t) noexcept {
  const int64_t groups = (t.lanes + 15) / 16, pairs = groups / 2 * 2;
  const int64_t whole = t.rows / 32 * 32, tall_rows = t.rows / 64 * 64, rest = t.rows - whole;
  Sums s;
  if (whole > 0) {
    configure(16, 16);
    for (int64_t g = 0; g < pairs; g += 2)
      for (int64_t r = 0; r < whole; r += 32) wide(t, r, 16, 16, g, s);
    if (pairs < groups) {
      for (int64_t r = 0; r < tall_rows; r += 64) tall(t, r, pairs, s);
      for (int64_t r = tall_rows; r < whole; r += 16) narrow(t, r, 16, pairs, false, s);
    }
  }
  if (rest > 0) {
    const int first = static_cast<int>(rest < 16 ? rest : 16),
              second = static_cast<int>(rest) - first;
    configure(first, second);
    for (int64_t g = 0; g < pairs; g += 2) {
      if (second > 0) {
        wide(t, whole, first, second, g, s);
      } else {
        narrow(t, whole, first, g, true, s);
      }
    }
    if (pairs < groups) {
      narrow(t, whole, first, pairs, false, s);
      if (second > 0) {
        configure(second, 0);
        narrow(t, whole + first, second, pairs, false, s);
      }
    }
  }
  amx::release();
}

}  // namespace v3b::kern
#endif
