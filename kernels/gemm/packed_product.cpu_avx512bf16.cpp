// Packed products with VDPBF16PS: R rows of activations, broadcast, against G groups of 16 outputs (packed_weight.h).
//
// Bound: a step of R rows and G groups is G loads of weights (64 bytes each), R broadcast loads and R*G products; 8 x 3
// are 11 loads for 24 products of 64 FLOP, and 192 bytes of weights in 24 cycles of the product port: 8 bytes a cycle,
// which is the memory's speed of one core. The latency of a product is about 15 cycles at 512 bits, so 16 to 24 sums run
// side by side: with fewer rows, U steps have sums of their own.
// FP8: a line of 64 codes is widened to two steps in registers, 4 operations of which 2 shuffle, beside 2*R products; 7
// with 7 shuffle slots where the block is marked (fp8_packed_avx512-inl.h).
// GCC 12 warns about the undefined registers inside its own AVX-512 headers (its bug 105593).
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC target("avx512vbmi")
#include <immintrin.h>

#include "kernels/gemm/fp8_packed_avx512-inl.h"
#include "kernels/gemm/packed_weight.h"

namespace v3b::kern {
namespace {

constexpr int64_t kChunk = 8;   // rows of activations in a tile
constexpr int64_t kGroups = 3;  // groups of outputs in a tile
// Up to so many rows a row's bits do not depend on its company: four sums of every output, whatever the tile. Plain and
// speculative decoding (three drafts) then see the same logits.
constexpr int64_t kAlike = 4;
constexpr int64_t kOneStream = 2;  // up to so many rows one group at a time: one linear stream
// Steps of a chain: its error grows with its length (notes/gemm.md).
constexpr int64_t kDepth = 512;
constexpr int64_t kBlock = 128;   // of FP8 scales
constexpr int64_t kAhead = 8192;  // bytes that a stream is asked for ahead

inline __m512 dot(__m512 acc, __m512i x, __m512i w) noexcept {
  return _mm512_dpbf16_ps(acc, (__m512bh)x, (__m512bh)w);
}
inline __m512i broadcast(const uint32_t* p) noexcept {
  return _mm512_set1_epi32(static_cast<int>(*p));
}
inline void prefetch_l1(const void* p) noexcept {
  _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T0);
}
inline void prefetch_l2(const void* p) noexcept {
  _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T1);
}

// One stream is left to the machine (notes/gemm.md); of three, some lines would be thrown out of L1 before their turn.
template <int G>
inline void prefetch_stream(const void* p) noexcept {
  if (G > 1) prefetch_l2(p);
}

// Steps that have sums of their own: a power of two, at most 24 sums.
constexpr int split(int r, int g) {
  if (r <= kAlike && r * g * 4 <= 24) return 4;
  int u = 1;
  while (u < 8 && r * g * u * 2 <= 24) u *= 2;
  return u;
}

struct Tile {
  const uint32_t* w = nullptr;  // of the first group
  int64_t group = 0;            // dwords from group to group
  const uint32_t* x = nullptr;  // [steps][R]
  int64_t steps = 0;            // a multiple of 16
  float* c = nullptr;
  int64_t ldc = 0;
  bool add = false;
  int64_t ahead = 0;  // bytes that each stream is asked for ahead (stream)
  const uint32_t* next =
      nullptr;  // lines to ask for in L2, one a step of one group (next) or of two (next2)
  const float* sw = nullptr;  // [G] scales of the sums, null: one
  const float* sx = nullptr;  // of row r at sx[r * sx_ld], null: one
  int64_t sx_ld = 0;
};

enum class Ahead { none, stream, next, next2 };

// Sums of a tile into C.
template <int U, int R, int G>
__attribute__((always_inline)) inline void finish(const Tile& t, __m512 (&acc)[U][R][G]) noexcept {
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int g = 0; g < G; ++g) {
#pragma GCC unroll 3
      for (int half = U / 2; half > 0; half /= 2)
#pragma GCC unroll 4
        for (int u = 0; u < half; ++u)
          acc[u][r][g] = _mm512_add_ps(acc[u][r][g], acc[u + half][r][g]);
      float* c = t.c + r * t.ldc + 16 * g;
      __m512 sum = acc[0][r][g];
      if (t.sw != nullptr) {
        const __m512 scale =
            _mm512_set1_ps(t.sx != nullptr ? t.sx[r * t.sx_ld] * t.sw[g] : t.sw[g]);
        sum = t.add ? _mm512_fmadd_ps(sum, scale, _mm512_loadu_ps(c)) : _mm512_mul_ps(sum, scale);
      } else if (t.add) {
        sum = _mm512_add_ps(sum, _mm512_loadu_ps(c));
      }
      _mm512_storeu_ps(c, sum);
    }
}
template <int U, int R, int G>
__attribute__((always_inline)) inline void clear(__m512 (&acc)[U][R][G]) noexcept {
#pragma GCC unroll 8
  for (int u = 0; u < U; ++u)
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
      for (int g = 0; g < G; ++g) acc[u][r][g] = _mm512_setzero_ps();
}

template <int R, int G, Ahead kFetch>
void micro(const Tile& t) noexcept {
  constexpr int U = split(R, G);
  __m512 acc[U][R][G];
  clear(acc);
  const uint32_t* w = t.w;
  const uint32_t* x = t.x;
  const uint32_t* next = t.next;
  for (int64_t s = 0; s < t.steps; s += U) {
#pragma GCC unroll 8
    for (int u = 0; u < U; ++u) {
      __m512i b[G];
#pragma GCC unroll 4
      for (int g = 0; g < G; ++g) {
        b[g] = _mm512_load_si512(w + g * t.group);
        if (kFetch == Ahead::stream)
          prefetch_stream<G>(reinterpret_cast<const char*>(w + g * t.group) + t.ahead);
      }
      if (kFetch == Ahead::next2) prefetch_l2(next + t.group);
      if (kFetch == Ahead::next || kFetch == Ahead::next2) prefetch_l2(next), next += 16;
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        const __m512i a = broadcast(x + r);
#pragma GCC unroll 4
        for (int g = 0; g < G; ++g) acc[u][r][g] = dot(acc[u][r][g], a, b[g]);
      }
      w += 16, x += R;
    }
  }
  finish(t, acc);
}

using Micro = void (*)(const Tile&) noexcept;
template <int G, Ahead kFetch>
constexpr Micro kByRows[kChunk] = {micro<1, G, kFetch>, micro<2, G, kFetch>, micro<3, G, kFetch>,
                                   micro<4, G, kFetch>, micro<5, G, kFetch>, micro<6, G, kFetch>,
                                   micro<7, G, kFetch>, micro<8, G, kFetch>};
template <Ahead kFetch>
Micro pick(int64_t rows, int64_t groups) noexcept {
  if (groups == 1) return kByRows<1, kFetch>[rows - 1];
  if (groups == 2) return kByRows<2, kFetch>[rows - 1];
  return kByRows<3, kFetch>[rows - 1];
}
Micro pick(Ahead fetch, int64_t rows, int64_t groups) noexcept {
  if (fetch == Ahead::none) return pick<Ahead::none>(rows, groups);
  if (fetch == Ahead::stream) return pick<Ahead::stream>(rows, groups);
  if (fetch == Ahead::next2) return pick<Ahead::next2>(rows, groups);
  return pick<Ahead::next>(rows, groups);
}
inline int64_t least(int64_t a, int64_t b) noexcept { return a < b ? a : b; }
inline int64_t tile_groups(int64_t m) noexcept { return m > kAlike ? kGroups : m == 3 ? 2 : 1; }

// Up to a chunk of rows: each line of weights is read once, from memory.
void few_bf16(const PackedWeight& w, const PackedRows& x, int64_t g0, int64_t g1, float* c,
              int64_t ldc, bool add) noexcept {
  const int64_t steps = packed_depth(w.type, w.k) / 2;
  const auto* data = static_cast<const uint32_t*>(w.data);
  Tile t;
  t.group = steps * 16, t.ldc = ldc;
  for (int64_t g = g0, n = 0; g < g1; g += n) {
    n = least(tile_groups(x.m), g1 - g);
    t.c = c + (g - g0) * 16;
    // The last lines of a group ask for the first ones of the group that this stream goes on with.
    const int64_t tail = least(kAhead / 64, steps);
    for (int64_t s = 0; s < steps; s += t.steps) {
      t.steps = s < steps - tail ? least(kDepth, steps - tail - s) : steps - s;
      t.ahead = s < steps - tail ? kAhead : tail * 64 + (n - 1) * t.group * 4;
      t.w = data + g * t.group + s * 16;
      t.x = x.data + s * x.m;
      t.add = add || s > 0;
      pick<Ahead::stream>(x.m, n)(t);
    }
  }
}

// More rows: a block of weights stays in L2 for all of them, and they ask for the next block meanwhile.
void many_bf16(const PackedWeight& w, const PackedRows& x, int64_t g0, int64_t g1, float* c,
               int64_t ldc, bool add) noexcept {
  const int64_t steps = packed_depth(w.type, w.k) / 2;
  const auto* data = static_cast<const uint32_t*>(w.data);
  Tile t;
  t.group = steps * 16, t.ldc = ldc;
  for (int64_t g = g0, n = 0; g < g1; g += n) {
    n = least(kGroups, g1 - g);
    for (int64_t s = 0; s < steps; s += kDepth) {
      t.w = data + g * t.group + s * 16;
      t.steps = least(kDepth, steps - s);
      t.add = add || s > 0;
      const bool last = s + kDepth >= steps;
      const uint32_t* next = last ? data + (g + n) * t.group : t.w + kDepth * 16;
      const bool two = x.m <= 2 * kChunk && n == kGroups;  // two passes for three groups
      for (int64_t r = 0; r < x.m; r += kChunk) {
        const int64_t rows = least(kChunk, x.m - r), pass = r / kChunk;
        t.x = x.data + r * steps + s * rows;
        t.c = c + r * ldc + (g - g0) * 16;
        Ahead fetch = Ahead::none;
        if (two) {
          fetch = pass == 0 ? Ahead::next2 : Ahead::next, t.next = next + 2 * pass * t.group;
        } else if (pass < n) {
          fetch = Ahead::next, t.next = next + pass * t.group;
        }
        pick(fetch, rows, n)(t);
      }
    }
  }
}

// One block of 128 of K, 64 steps at most, of up to three groups.
struct Widened {
  alignas(64) uint32_t step[kGroups][kBlock / 2 * 16];
};
struct CodeTile : Tile {
  const uint8_t* codes = nullptr;  // of the first group
  int64_t code_group = 0;          // bytes
  bool marked[kGroups] = {};       // widened by tables beforehand, into `wide`
  Widened* wide = nullptr;
};

void widen_marked(const CodeTile& t, int64_t g) noexcept {
  const PackedCodeBytes* tables = packed_code_tables();
  uint32_t* to = t.wide->step[g];
  for (int64_t i = 0; i < t.steps / 2; ++i, to += 32) {
    __m512i first, second;
    widen_any(tables, _mm512_load_si512(t.codes + g * t.code_group + i * 64), first, second);
    _mm512_store_si512(to, first);
    _mm512_store_si512(to + 16, second);
  }
}

// R rows against a block, widened in registers; kKeep: and into `wide`, for the rows that follow; kMarked: some group is. Two steps a line; a
// broadcast serves all groups, which is why each half of a line is widened when its turn comes (24 sums, 3 weights).
template <int R, int G, bool kKeep, bool kMarked>
void code_micro(const CodeTile& t) noexcept {
  constexpr int U = split(R, G), L = U < 2 ? 1 : U / 2;  // lines at a time
  // Few products a line: tables in the loop then, not by way of `wide`, which takes as long as the memory's line.
  constexpr bool kInLoop = R <= kOneStream && !kKeep;
  const PackedCodeBytes* tables = packed_code_tables();
  const CodeHigh high = load_code_high();
#pragma GCC unroll 4
  for (int g = 0; g < G; ++g)
    if (kMarked && !kInLoop && t.marked[g]) widen_marked(t, g);
  __m512 acc[U][R][G];
  clear(acc);
  const uint8_t* p = t.codes;
  const uint32_t* x = t.x;
  uint32_t* wide = t.wide->step[0];
  __m512i second[G];
  constexpr int64_t kWideGroup = kBlock / 2 * 16;
  for (int64_t s = 0; s < t.steps; s += 2 * L) {
#pragma GCC unroll 8
    for (int u = 0; u < 2 * L; ++u) {
      __m512i b[G];
#pragma GCC unroll 4
      for (int g = 0; g < G; ++g) {
        if (kMarked && kInLoop && t.marked[g]) {
          if (u % 2 == 0)
            widen_any(tables, _mm512_load_si512(p + g * t.code_group), b[g], second[g]);
          else
            b[g] = second[g];
        } else if (kMarked && t.marked[g]) {
          b[g] = _mm512_load_si512(wide + g * kWideGroup);
        } else {
          const __m512i line = _mm512_load_si512(p + g * t.code_group);
          b[g] = u % 2 == 0 ? widen_first(high, line) : widen_second(high, line);
          if (kKeep) _mm512_store_si512(wide + g * kWideGroup, b[g]);
        }
        if (u % 2 == 0) prefetch_stream<G>(p + g * t.code_group + t.ahead);
      }
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        const __m512i a = broadcast(x + r);
#pragma GCC unroll 4
        for (int g = 0; g < G; ++g) acc[u % U][r][g] = dot(acc[u % U][r][g], a, b[g]);
      }
      x += R, wide += 16;
      if (u % 2 == 1) p += 64;
    }
  }
  finish(t, acc);
}

using CodeMicro = void (*)(const CodeTile&) noexcept;
template <int G, bool kMarked>
constexpr CodeMicro kCodes[kChunk + 1] = {
    code_micro<1, G, false, kMarked>, code_micro<2, G, false, kMarked>,
    code_micro<3, G, false, kMarked>, code_micro<4, G, false, kMarked>,
    code_micro<5, G, false, kMarked>, code_micro<6, G, false, kMarked>,
    code_micro<7, G, false, kMarked>, code_micro<8, G, false, kMarked>,
    code_micro<8, G, true, kMarked>};  // more rows follow
template <bool kMarked>
CodeMicro pick_codes(int64_t m, int64_t groups) noexcept {
  const int64_t at = least(m, kChunk + 1) - 1;
  return groups == 1   ? kCodes<1, kMarked>[at]
         : groups == 2 ? kCodes<2, kMarked>[at]
                       : kCodes<3, kMarked>[at];
}

void product_codes(const PackedWeight& w, const PackedRows& x, int64_t g0, int64_t g1, float* c,
                   int64_t ldc, bool add) noexcept {
  Widened wide;
  const int64_t depth = packed_depth(w.type, w.k), steps = depth / 2,
                blocks = (w.k + kBlock - 1) / kBlock;
  float sw[kGroups];
  CodeTile t;
  t.code_group = depth * 16, t.ldc = ldc, t.sw = sw, t.sx_ld = x.scale_ld, t.wide = &wide;
  Tile rest = t;  // of the rows beyond the first chunk
  rest.w = wide.step[0], rest.group = kBlock / 2 * 16;
  const int64_t tail = least(kAhead, t.code_group);
  for (int64_t g = g0, n = 0; g < g1; g += n) {
    n = least(tile_groups(x.m), g1 - g);
    const CodeMicro normal = pick_codes<false>(x.m, n), marked = pick_codes<true>(x.m, n);
    prefetch_l1(packed_code_marks(w, g + n));  // what comes next and is no part of the stream
    if (w.scale != nullptr) prefetch_l1(w.scale + (g + n) / (kBlock / 16) * blocks);
    for (int64_t b = 0; b < blocks; ++b) {
      const int64_t at = b * kBlock * 16;
      t.codes = static_cast<const uint8_t*>(w.data) + g * t.code_group + at;
      t.steps = least(kBlock, depth - b * kBlock) / 2;
      t.ahead = at + kBlock * 16 <= t.code_group - tail ? kAhead : tail + (n - 1) * t.code_group;
      t.x = x.data + b * (kBlock / 2) * least(kChunk, x.m);
      t.c = c + (g - g0) * 16, t.add = add || b > 0;
      t.sx = x.scale == nullptr ? nullptr : x.scale + b;
      bool any = false;
      for (int64_t j = 0; j < n; ++j) {
        t.marked[j] = packed_code_marks(w, g + j)[b] != 0;
        any = any || t.marked[j];
        sw[j] = kPackedCodeScale * packed_scale(w, g + j, b);
      }
      (any ? marked : normal)(t);
      rest.steps = t.steps, rest.add = t.add;
      for (int64_t r = kChunk; r < x.m; r += kChunk) {
        const int64_t rows = least(kChunk, x.m - r);
        rest.x = x.data + r * steps + b * (kBlock / 2) * rows;
        rest.c = t.c + r * ldc;
        rest.sx = t.sx == nullptr ? nullptr : t.sx + r * x.scale_ld;
        pick<Ahead::none>(rows, n)(rest);
      }
    }
  }
}

}  // namespace

void packed_product_cpu_avx512bf16(const PackedWeight& w, const PackedRows& x, int64_t g0,
                                   int64_t g1, float* c, int64_t ldc, bool add) noexcept {
  if (x.m <= 0) return;
  if (w.type == spec::DType::f8e4m3) return product_codes(w, x, g0, g1, c, ldc, add);
  if (x.m <= kChunk) return few_bf16(w, x, g0, g1, c, ldc, add);
  many_bf16(w, x, g0, g1, c, ldc, add);
}

}  // namespace v3b::kern
