// Packed products with VDPBF16PS: R rows of activations, broadcast, against G groups of 16 outputs (packed_weight.h).
//
// Bound: a step of R rows and G groups is G loads of weights (64 bytes each), R broadcast loads and R*G products; 8 x 3
// are 11 loads for 24 products of 64 FLOP, and 192 bytes of weights in 24 cycles of the product port: 8 bytes a cycle,
// which is the memory's speed of one core. The latency of a product is about 15 cycles at 512 bits, so 16 to 24 sums run
// side by side: with fewer rows, U steps have sums of their own.
// FP8: a block of 64 codes is widened to two steps in registers, 2 table look-ups (2 shuffle slots each), an OR of the
// sign and 2 unpacks, beside 2*R products.
// GCC 12 warns about the undefined registers inside its own AVX-512 headers (its bug 105593).
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC target("avx512vbmi")
#include <immintrin.h>

#include "kernels/gemm/fp8_widen_avx512-inl.h"
#include "kernels/gemm/packed_weight.h"

namespace v3b::kern {
namespace {

constexpr int64_t kChunk = 8;   // rows of activations in a tile
constexpr int64_t kGroups = 3;  // groups of outputs in a tile
constexpr int64_t kDepth =
    512;  // steps of a chain: its error grows with its length (notes/gemm.md)
constexpr int64_t kBlock = 128;   // of FP8 scales
constexpr int64_t kAhead = 4096;  // bytes that a stream is asked for ahead

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

// Steps that have sums of their own: a power of two, at most 24 sums.
constexpr int split(int r, int g) {
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
  const uint32_t* next = nullptr;  // lines to ask for, one a step (kNext)
  const float* sw = nullptr;       // [G] scales of the sums, null: one
  const float* sx = nullptr;       // of row r at sx[r * sx_ld], null: one
  int64_t sx_ld = 0;
};

enum class Ahead { none, stream, next };

template <int R, int G, Ahead kFetch>
void micro(const Tile& t) noexcept {
  constexpr int U = split(R, G);
  __m512 acc[U][R][G];
#pragma GCC unroll 8
  for (int u = 0; u < U; ++u)
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
      for (int g = 0; g < G; ++g) acc[u][r][g] = _mm512_setzero_ps();
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
          prefetch_l1(reinterpret_cast<const char*>(w + g * t.group) + kAhead);
      }
      if (kFetch == Ahead::next) prefetch_l2(next), next += 16;
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        const __m512i a = broadcast(x + r);
#pragma GCC unroll 4
        for (int g = 0; g < G; ++g) acc[u][r][g] = dot(acc[u][r][g], a, b[g]);
      }
      w += 16, x += R;
    }
  }
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
  return pick<Ahead::next>(rows, groups);
}
inline int64_t least(int64_t a, int64_t b) noexcept { return a < b ? a : b; }

void product_bf16(const PackedWeight& w, const PackedRows& x, int64_t g0, int64_t g1, float* c,
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
      for (int64_t r = 0; r < x.m; r += kChunk) {
        const int64_t rows = least(kChunk, x.m - r), pass = r / kChunk;
        t.x = x.data + r * steps + s * rows;
        t.c = c + r * ldc + (g - g0) * 16;
        Ahead fetch = Ahead::none;
        if (x.m <= kChunk) {
          fetch = Ahead::stream;
        } else if (pass < n) {
          // The block that follows this one on each stream, spread over the first passes.
          fetch = Ahead::next, t.next = t.w + pass * t.group + t.steps * 16;
        }
        pick(fetch, rows, n)(t);
      }
    }
  }
}

// One block of 128 of K (64 steps at most) of up to three groups, widened.
struct Widened {
  alignas(64) uint32_t step[kGroups][kBlock / 2 * 16];
};

// R rows, one chunk: widened in registers, sums of a block of 128 scaled into `total`.
template <int R, int G>
void codes(const PackedWeight& w, const PackedRows& x, int64_t g0, float* c, int64_t ldc,
           bool add) noexcept {
  constexpr int U = R * G * 2 <= 24 ? 2 : 1;
  const WidenTables table = load_widen_tables();
  const int64_t depth = packed_depth(w.type, w.k), group = depth * 16,
                blocks = (w.k + kBlock - 1) / kBlock;
  const auto* p = static_cast<const uint8_t*>(w.data) + g0 * group;
  const uint32_t* xp = x.data;
  __m512 total[R][G];
  for (int r = 0; r < R; ++r)
    for (int g = 0; g < G; ++g)
      total[r][g] = add ? _mm512_loadu_ps(c + r * ldc + 16 * g) : _mm512_setzero_ps();
  for (int64_t b = 0; b < blocks; ++b) {
    __m512 acc[U][R][G];
#pragma GCC unroll 2
    for (int u = 0; u < U; ++u)
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
        for (int g = 0; g < G; ++g) acc[u][r][g] = _mm512_setzero_ps();
    const int64_t lines = least(kBlock, depth - b * kBlock) / 4;
    for (int64_t i = 0; i < lines; ++i) {
#pragma GCC unroll 4
      for (int g = 0; g < G; ++g) {
        __m512i first, second;
        widen_unordered(table, _mm512_load_si512(p + g * group), first, second);
        prefetch_l1(p + g * group + kAhead);
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) {
          acc[0][r][g] = dot(acc[0][r][g], broadcast(xp + r), first);
          acc[U - 1][r][g] = dot(acc[U - 1][r][g], broadcast(xp + R + r), second);
        }
      }
      p += 64, xp += 2 * R;
    }
    float sw[G];
#pragma GCC unroll 4
    for (int g = 0; g < G; ++g)
      sw[g] = w.scale == nullptr ? 1.0F : w.scale[(g0 + g) / (kBlock / 16) * blocks + b];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const float sx = x.scale == nullptr ? 1.0F : x.scale[r * x.scale_ld + b];
#pragma GCC unroll 4
      for (int g = 0; g < G; ++g) {
        const __m512 sum = U == 2 ? _mm512_add_ps(acc[0][r][g], acc[1][r][g]) : acc[0][r][g];
        total[r][g] = _mm512_fmadd_ps(sum, _mm512_set1_ps(sx * sw[g]), total[r][g]);
      }
    }
  }
  for (int r = 0; r < R; ++r)
    for (int g = 0; g < G; ++g) _mm512_storeu_ps(c + r * ldc + 16 * g, total[r][g]);
}

using Codes = void (*)(const PackedWeight&, const PackedRows&, int64_t, float*, int64_t,
                       bool) noexcept;
template <int G>
constexpr Codes kCodes[kChunk] = {codes<1, G>, codes<2, G>, codes<3, G>, codes<4, G>,
                                  codes<5, G>, codes<6, G>, codes<7, G>, codes<8, G>};

// Several chunks: each block of 128 of K is widened once, in L1.
void codes_many(const PackedWeight& w, const PackedRows& x, int64_t g, int64_t n, float* c,
                int64_t ldc, bool add) noexcept {
  const WidenTables table = load_widen_tables();
  Widened wide;
  const int64_t depth = packed_depth(w.type, w.k), group = depth * 16, steps = depth / 2,
                blocks = (w.k + kBlock - 1) / kBlock;
  const auto* p = static_cast<const uint8_t*>(w.data) + g * group;
  float sw[kGroups];
  Tile t;
  t.w = wide.step[0], t.group = kBlock / 2 * 16, t.ldc = ldc, t.sw = sw, t.sx_ld = x.scale_ld;
  for (int64_t b = 0; b < blocks; ++b) {
    const int64_t lines = least(kBlock, depth - b * kBlock) / 4;
    for (int64_t j = 0; j < n; ++j) {
      const uint8_t* from = p + j * group + b * kBlock * 16;
      for (int64_t i = 0; i < lines; ++i) {
        __m512i first, second;
        widen_unordered(table, _mm512_load_si512(from + i * 64), first, second);
        prefetch_l2(from + i * 64 + kBlock * 16);
        _mm512_store_si512(wide.step[j] + i * 32, first);
        _mm512_store_si512(wide.step[j] + i * 32 + 16, second);
      }
      sw[j] = w.scale == nullptr ? 1.0F : w.scale[(g + j) / (kBlock / 16) * blocks + b];
    }
    t.steps = lines * 2, t.add = add || b > 0;
    for (int64_t r = 0; r < x.m; r += kChunk) {
      const int64_t rows = least(kChunk, x.m - r);
      t.x = x.data + r * steps + b * (kBlock / 2) * rows;
      t.c = c + r * ldc;
      t.sx = x.scale == nullptr ? nullptr : x.scale + r * x.scale_ld + b;
      pick<Ahead::none>(rows, n)(t);
    }
  }
}

void product_codes(const PackedWeight& w, const PackedRows& x, int64_t g0, int64_t g1, float* c,
                   int64_t ldc, bool add) noexcept {
  for (int64_t g = g0, n = 0; g < g1; g += n) {
    n = least(kGroups, g1 - g);
    float* to = c + (g - g0) * 16;
    if (x.m > kChunk) {
      codes_many(w, x, g, n, to, ldc, add);
    } else if (n == 1) {
      kCodes<1>[x.m - 1](w, x, g, to, ldc, add);
    } else if (n == 2) {
      kCodes<2>[x.m - 1](w, x, g, to, ldc, add);
    } else {
      kCodes<3>[x.m - 1](w, x, g, to, ldc, add);
    }
  }
}

}  // namespace

void packed_product_cpu_avx512bf16(const PackedWeight& w, const PackedRows& x, int64_t g0,
                                   int64_t g1, float* c, int64_t ldc, bool add) noexcept {
  if (x.m <= 0) return;
  if (w.type == spec::DType::f8e4m3) return product_codes(w, x, g0, g1, c, ldc, add);
  product_bf16(w, x, g0, g1, c, ldc, add);
}

}  // namespace v3b::kern
