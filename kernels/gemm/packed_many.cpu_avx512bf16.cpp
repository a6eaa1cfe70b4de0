// Many rows on a packed bf16 weight with VDPBF16PS: 8 rows of activations, broadcast, against 3 groups of 16 outputs.
//
// Bound: as in packed_product.cpu_avx512bf16.cpp, 11 loads for 24 products a step; with many rows the weights come from L2
// (8 bytes a cycle) and a chunk of 8 rows x 512 steps (16 KiB) stays in L1 while all groups of the unit pass, so L3 sees
// it once a unit. The last block of K goes straight to C, rounded on the way where C is bf16.
// GCC 12 warns about the undefined registers inside its own AVX-512 headers (its bug 105593).
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include "kernels/gemm/packed_many.h"

#include <immintrin.h>

#include "kernels/gemm/first_lanes_avx512-inl.h"

namespace v3b::kern {
namespace {

constexpr int64_t kChunk = 8, kGroups = 3;
constexpr int64_t kDepth = 512;             // steps of a chain, as for few rows
constexpr int64_t kPanelBytes = 512 << 10;  // of weights in L2 (1 MiB on Zen 4, 2 on SPR)
inline int64_t least(int64_t a, int64_t b) noexcept { return a < b ? a : b; }

enum class To { sums, f32, bf16 };

struct Tile {
  const uint32_t* w = nullptr;
  int64_t group = 0;
  const uint32_t* x = nullptr;
  int64_t steps = 0;
  float* sums = nullptr;  // of earlier blocks, and of this one unless it is the last
  int64_t ld = 0;
  bool add = false;  // sums hold something
  To to = To::sums;
  void* c = nullptr;
  int64_t ldc = 0, n = 0;  // outputs that exist from c on
  bool add_c = false;
  const char *next = nullptr,
             *end = nullptr;  // asked for in L2, a line a step; from end on the next piece
  int64_t jump = 0,
          pitch = 0;  // from the last line of a piece to the next one; from piece to piece
};

template <int R, int G>
void micro(const Tile& t) noexcept {
  constexpr int U = R * G * 2 <= 16 ? 2 : 1;  // steps with sums of their own
  __m512 acc[U][R][G];
#pragma GCC unroll 2
  for (int u = 0; u < U; ++u)
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
      for (int g = 0; g < G; ++g) acc[u][r][g] = _mm512_setzero_ps();
  const uint32_t* w = t.w;
  const uint32_t* x = t.x;
  const char *next = t.next, *end = t.end;
  for (int64_t s = 0; s < t.steps; s += U) {
#pragma GCC unroll 2
    for (int u = 0; u < U; ++u) {
      __m512i b[G];
#pragma GCC unroll 4
      for (int g = 0; g < G; ++g) b[g] = _mm512_load_si512(w + g * t.group);
      _mm_prefetch(next, _MM_HINT_T1);
      const bool on = next + 64 < end;
      next += on ? 64 : t.jump, end += on ? 0 : t.pitch;
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        const __m512i a = _mm512_set1_epi32(static_cast<int>(x[r]));
#pragma GCC unroll 4
        for (int g = 0; g < G; ++g)
          acc[u][r][g] = _mm512_dpbf16_ps(acc[u][r][g], (__m512bh)a, (__m512bh)b[g]);
      }
      w += 16, x += R;
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int g = 0; g < G; ++g) {
      __m512 sum = acc[0][r][g];
      if (U == 2) sum = _mm512_add_ps(sum, acc[U - 1][r][g]);
      float* sums = t.sums + r * t.ld + 16 * g;
      if (t.add) sum = _mm512_add_ps(sum, _mm512_loadu_ps(sums));
      if (t.to == To::sums) {
        _mm512_storeu_ps(sums, sum);
        continue;
      }
      const __mmask16 mask = first_n(t.n - 16 * g);
      const int64_t at = r * t.ldc + 16 * g;
      if (t.to == To::bf16) {
        _mm256_mask_storeu_epi16(static_cast<uint16_t*>(t.c) + at, mask,
                                 (__m256i)_mm512_cvtneps_pbh(sum));
      } else {
        float* c = static_cast<float*>(t.c) + at;
        if (t.add_c) sum = _mm512_add_ps(sum, _mm512_maskz_loadu_ps(mask, c));
        _mm512_mask_storeu_ps(c, mask, sum);
      }
    }
}

using Micro = void (*)(const Tile&) noexcept;
template <int G>
constexpr Micro kByRows[kChunk] = {micro<1, G>, micro<2, G>, micro<3, G>, micro<4, G>,
                                   micro<5, G>, micro<6, G>, micro<7, G>, micro<8, G>};
Micro pick(int64_t rows, int64_t groups) noexcept {
  if (groups == 1) return kByRows<1>[rows - 1];
  if (groups == 2) return kByRows<2>[rows - 1];
  return kByRows<3>[rows - 1];
}

// What the tiles of a chunk of rows ask for meanwhile, one piece after the other: a line a step.
struct Ahead {
  static constexpr int kMost = 3;
  const char* at[kMost];
  int64_t lines[kMost], pitch[kMost], left[kMost];
  int count = 0, now = 0;
  void add(const void* p, int64_t pieces, int64_t bytes, int64_t from_piece_to_piece) noexcept {
    at[count] = static_cast<const char*>(p), lines[count] = (bytes + 63) / 64;
    pitch[count] = from_piece_to_piece, left[count] = pieces * lines[count], ++count;
  }
  void take(Tile& t) noexcept {
    while (now < count && left[now] <= 0) ++now;
    t.pitch = t.jump = 0;
    if (now == count) {
      t.next = t.end = reinterpret_cast<const char*>(t.x);
      return;
    }
    const int64_t bytes = lines[now] * 64;
    t.next = at[now], t.end = at[now] + bytes;
    t.pitch = pitch[now], t.jump = t.pitch - bytes + 64;
    at[now] += t.steps / lines[now] * t.pitch, left[now] -= t.steps;
  }
};

// Steps [b, end) of rows [r, r + rows) of a source into out.
void pack_block(const RowsSource& source, int64_t r, int64_t rows, int64_t b, int64_t end,
                uint32_t* out) noexcept {
  RowsSource s = source;
  s.x = static_cast<const uint16_t*>(source.x) + r * source.ld + 2 * b;
  s.m = rows, s.k = least(2 * end, source.k) - 2 * b;
  packed_rows_cpu_avx512bf16(s, false, out, 0, rows);
}

}  // namespace

void packed_many_cpu_avx512bf16(const PackedMany& p) noexcept {
  const int64_t steps = packed_depth(spec::DType::bf16, p.k) / 2, groups = p.g1 - p.g0;
  const int64_t ld = groups * 16;
  // Blocks of K whose weights stay in L2, in whole chains.
  const int64_t most = kPanelBytes / (groups * 64 * kDepth);
  const int64_t block = (most < 1 ? 1 : most) * kDepth;
  const bool one = steps <= block;  // then the sums of a chunk of rows are all that is kept
  Tile t;
  t.group = steps * 16, t.ld = ld, t.ldc = p.ldc, t.add_c = p.add;
  const int64_t out = p.type == spec::DType::bf16 ? 2 : 4;
  auto* const c = static_cast<uint8_t*>(p.c) + p.g0 * 16 * out;
  for (int64_t b = 0; b < steps; b += block) {
    const int64_t end = least(steps, b + block);
    const uint32_t* after = end < steps ? p.w + p.g0 * t.group + end * 16 : p.w + p.g1 * t.group;
    for (int64_t r = 0; r < p.m; r += kChunk) {
      const int64_t rows = least(kChunk, p.m - r), left = (p.m - r + kChunk - 1) / kChunk;
      uint32_t* const x = p.x + (p.keep ? r * steps + b * rows : 0);
      if (p.source != nullptr) pack_block(*p.source, r, rows, b, end, x);
      Ahead ahead;
      if (left > 1 && end == steps)  // where the next chunk's sums go
        ahead.add(c + (r + kChunk) * p.ldc * out, kChunk, ld * out, p.ldc * out);
      if (p.source != nullptr)
        ahead.add(static_cast<const uint16_t*>(p.source->x) + (r + kChunk) * p.source->ld + 2 * b,
                  kChunk, (end - b) * 4, p.source->ld * 2);
      for (int64_t s = b; s < end; s += kDepth) {
        t.steps = least(kDepth, end - s);
        t.x = x + (s - b) * rows;
        t.add = s > 0;
        const bool last = s + t.steps == steps;
        t.to = !last ? To::sums : p.type == spec::DType::bf16 ? To::bf16 : To::f32;
        for (int64_t g = 0, n = 0; g < groups; g += n) {
          n = least(kGroups, groups - g);
          t.w = p.w + (p.g0 + g) * t.group + s * 16;
          t.sums = p.sums + (one ? 0 : r * ld) + g * 16;
          t.n = p.n - (p.g0 + g) * 16;
          t.c = c + (r * p.ldc + g * 16) * out;
          if (left <= n) {  // the last chunks: the weights that come next
            t.next = reinterpret_cast<const char*>(after + (g + left - 1) * t.group + (s - b) * 16);
            t.end = t.next + t.steps * 64, t.pitch = t.jump = 0;
          } else {
            ahead.take(t);
          }
          pick(rows, n)(t);
        }
      }
    }
  }
}

}  // namespace v3b::kern
