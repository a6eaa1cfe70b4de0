// Packed products with AMX: A = 16 rows of activations x 32 of K, B = 16 steps of a group as they lie in a packed
// weight (packed_weight.h), C = 16 rows x 16 outputs.
//
// Bound: TDPBF16PS on full tiles is 16 cycles. Up to 16 rows: one A against four groups, five tile loads of 16 lines for
// four products; the product of few rows takes as many cycles as it has rows, and the weights' lines bind: 64 bytes a
// cycle from L1. More rows: two A against two groups, four loads for four products. FP8: 128 of K of the groups widened
// in L1 (fp8_packed_avx512-inl.h), the sums of each block stored, scaled and added: 16 rows, two
// groups: 256 cycles of products to 32 stores, loads and multiply-adds.
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC target("avx512vbmi")
#include <immintrin.h>

#include "kernels/core/amx.h"
#include "kernels/gemm/amx_products-inl.h"
#include "kernels/gemm/packed_weight.h"

#if defined(V3B_AMX_EMULATE) || defined(__AMX_TILE__)
#include "kernels/gemm/fp8_packed_avx512-inl.h"

namespace v3b::kern {
namespace {

constexpr int64_t kRows = 16, kGroups = 4, kBlock = 128;
constexpr int64_t kDepth = 512;   // steps of a block that stays in L2 for all rows
constexpr int64_t kAhead = 4096;  // bytes

inline int64_t least(int64_t a, int64_t b) noexcept { return a < b ? a : b; }

struct Widened {
  alignas(64) uint32_t step[kGroups][kBlock / 2 * 16];
};

// What one call of the tiles takes.
struct Block {
  const uint32_t* w = nullptr;  // of the first group
  int64_t group = 0;            // dwords
  int64_t groups = 0, steps = 0;
  float* c = nullptr;
  int64_t ldc = 0;
  bool add = false;
  const float* sw = nullptr;  // null: one
  const float* sx = nullptr;  // of row r at sx[r * sx_ld]; null: one
  int64_t sx_ld = 0;
};

void put(const Block& b, const float* tile, int64_t r0, int64_t rows, int64_t g) noexcept {
  for (int64_t r = 0; r < rows; ++r) {
    float* c = b.c + (r0 + r) * b.ldc + 16 * g;
    __m512 sum = _mm512_load_ps(tile + 16 * r);
    if (b.sw != nullptr)
      sum = _mm512_mul_ps(
          sum, _mm512_set1_ps(b.sx != nullptr ? b.sx[(r0 + r) * b.sx_ld] * b.sw[g] : b.sw[g]));
    if (b.add) sum = _mm512_add_ps(sum, _mm512_loadu_ps(c));
    _mm512_storeu_ps(c, sum);
  }
}

// C 0..3, A 4 (and 5), B 6 and 7 in turn.
void configure(int64_t first, int64_t second) noexcept {
  amx::Config c;
  const int a = static_cast<int>(first), b = static_cast<int>(second > 0 ? second : first);
  c.tile(0, a, 64), c.tile(1, a, 64), c.tile(2, b, 64), c.tile(3, b, 64);
  c.tile(4, a, 64), c.tile(5, b, 64), c.tile(6, 16, 64), c.tile(7, 16, 64);
  amx::configure(c);
}

// One A tile (x: [steps / 16][rows][16]) against up to four groups.
void single(const Block& b, const uint32_t* x, int64_t r0, int64_t rows, Sums& s) noexcept {
  const uint32_t* w = b.w;
  zero_sums();
  for (int64_t k = 0; k < b.steps; k += 16) {
    amx::load<4>(x + k * rows, 64);
    amx::load<6>(w + k * 16, 64);
    amx::dpbf16<0, 4, 6>();
    if (b.groups > 1) {
      amx::load<7>(w + b.group + k * 16, 64);
      amx::dpbf16<1, 4, 7>();
    }
    if (b.groups > 2) {
      amx::load<6>(w + 2 * b.group + k * 16, 64);
      amx::dpbf16<2, 4, 6>();
    }
    if (b.groups > 3) {
      amx::load<7>(w + 3 * b.group + k * 16, 64);
      amx::dpbf16<3, 4, 7>();
    }
    for (int64_t g = 0; g < b.groups; ++g)
      for (int64_t line = 0; line < 16; ++line)
        _mm_prefetch(reinterpret_cast<const char*>(w + g * b.group + (k + line) * 16) + kAhead,
                     _MM_HINT_T0);
  }
  store_sums(s);
  for (int64_t g = 0; g < b.groups; ++g) put(b, s.tile[g], r0, rows, g);
}

// Two A tiles, of 16 and `second` rows, against groups g and g + 1.
void pair(const Block& b, const uint32_t* x0, const uint32_t* x1, int64_t r0, int64_t second,
          int64_t g, Sums& s) noexcept {
  const uint32_t* w0 = b.w + g * b.group;
  product_2x2({x0, 16 * kRows}, {x1, 16 * second}, 64, w0, w0 + b.group, b.steps, s);
  put(b, s.tile[0], r0, kRows, g);
  put(b, s.tile[1], r0, kRows, g + 1);
  put(b, s.tile[2], r0 + kRows, second, g);
  put(b, s.tile[3], r0 + kRows, second, g + 1);
}

// All rows against the block; step s0 of x. The configuration changes for the last rows only.
void run(const Block& b, const PackedRows& x, int64_t all_steps, int64_t s0, Sums& s) noexcept {
  const auto at = [&](int64_t r) { return x.data + r * all_steps + s0 * least(kRows, x.m - r); };
  if (x.m <= kRows) {
    configure(x.m, 0);
    return single(b, at(0), 0, x.m, s);
  }
  const int64_t even = b.groups / 2 * 2;
  Block last = b;  // of an odd number
  if (even < b.groups) {
    last.groups = 1, last.w += even * b.group, last.c += 16 * even;
    if (last.sw != nullptr) last.sw += even;
  }
  for (int64_t r = 0; r < x.m; r += 2 * kRows) {
    const int64_t first = least(kRows, x.m - r), second = least(kRows, x.m - r - first);
    if (second <= 0) {
      configure(first, 0);
      single(b, at(r), r, first, s);
      continue;
    }
    if (r == 0 || second < kRows) configure(kRows, second);
    for (int64_t g = 0; g < even; g += 2) pair(b, at(r), at(r + kRows), r, second, g, s);
    if (even < b.groups) {
      configure(kRows, 0);
      single(last, at(r), r, kRows, s);
      configure(second, 0);
      single(last, at(r + kRows), r + kRows, second, s);
      configure(kRows, kRows);
    }
  }
}

void widen(const uint8_t* from, bool marked, int64_t lines, uint32_t* to) noexcept {
  const CodeHigh high = load_code_high();
  const PackedCodeBytes* tables = packed_code_tables();
  for (int64_t i = 0; i < lines; ++i) {
    const __m512i line = _mm512_load_si512(from + i * 64);
    __m512i first, second;
    if (marked) {
      widen_any(tables, line, first, second);
    } else {
      first = widen_first(high, line), second = widen_second(high, line);
    }
    _mm_prefetch(reinterpret_cast<const char*>(from + i * 64) + kAhead, _MM_HINT_T0);
    _mm512_store_si512(to + i * 32, first);
    _mm512_store_si512(to + i * 32 + 16, second);
  }
}

}  // namespace

void V3B_AMX_ENTRY(packed_product_cpu_amx)(const PackedWeight& w, const PackedRows& x, int64_t g0,
                                           int64_t g1, float* c, int64_t ldc, bool add) noexcept {
  if (x.m <= 0) return;
  const int64_t depth = packed_depth(w.type, w.k), steps = depth / 2;
  Sums s;
  Block b;
  b.ldc = ldc;
  if (w.type == spec::DType::bf16) {
    b.group = steps * 16;
    for (int64_t g = g0; g < g1; g += kGroups)
      for (int64_t k = 0; k < steps; k += kDepth) {
        b.w = static_cast<const uint32_t*>(w.data) + g * b.group + k * 16;
        b.groups = least(kGroups, g1 - g), b.steps = least(kDepth, steps - k);
        b.c = c + (g - g0) * 16, b.add = add || k > 0;
        run(b, x, steps, k, s);
      }
    return amx::release();
  }
  const int64_t blocks = (w.k + kBlock - 1) / kBlock;
  Widened wide;
  float sw[kGroups];
  b.w = wide.step[0], b.group = kBlock / 2 * 16, b.sw = sw, b.sx_ld = x.scale_ld;
  for (int64_t g = g0; g < g1; g += kGroups)
    for (int64_t k = 0; k < blocks; ++k) {
      const int64_t lines = least(kBlock, depth - k * kBlock) / 4;
      b.groups = least(kGroups, g1 - g), b.steps = lines * 2;
      for (int64_t j = 0; j < b.groups; ++j) {
        widen(static_cast<const uint8_t*>(w.data) + ((g + j) * depth + k * kBlock) * 16,
              packed_code_marks(w, g + j)[k] != 0, lines, wide.step[j]);
        sw[j] = kPackedCodeScale * packed_scale(w, g + j, k);
      }
      b.sx = x.scale == nullptr ? nullptr : x.scale + k;
      b.c = c + (g - g0) * 16, b.add = add || k > 0;
      run(b, x, steps, k * (kBlock / 2), s);
    }
  amx::release();
}

}  // namespace v3b::kern
#endif
