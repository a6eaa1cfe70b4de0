// Packed products in floats (Highway: AVX2, AVX-512 without bf16 products, f32 weights at every level); see
// packed_weight.h. A pair of bf16 becomes two floats by a shift and a mask in registers; FP8 codes become floats 128 of K
// at a time in L1 (8 KiB a group of outputs).
//
// Bound: a step of R rows and G groups of V vectors is G*V loads of weights, R broadcast loads and R*G*V multiply-adds
// (two a cycle at 256 bits, one at 512 on Zen 4). AVX-512: 8 x 3 of 32 registers, 11 loads for 24; AVX2: 4 x 1 group
// (2 vectors) of 16 registers, 6 loads for 8.
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/gemm/packed_product.cpu_simd.cpp"
#include <hwy/foreach_target.h>  // IWYU pragma: keep
//
#include <hwy/cache_control.h>
#include <hwy/highway.h>

#include <algorithm>

#include "kernels/gemm/packed_weight.h"

HWY_BEFORE_NAMESPACE();
namespace v3b::kern::HWY_NAMESPACE {
namespace {
namespace hn = hwy::HWY_NAMESPACE;
using spec::DType;
using Df = hn::CappedTag<float, 16>;
using Du = hn::RebindToUnsigned<Df>;
using Vf = hn::Vec<Df>;

constexpr int64_t kChunk = 8, kBlock = 128;
constexpr int64_t kDepth = 1024, kDepthMany = 1024;  // of K in a block
constexpr int64_t kAhead = 4096;                     // bytes
constexpr bool kWide = HWY_MAX_BYTES >= 64;
constexpr int kVectors = kWide ? 1 : 16 / (HWY_MAX_BYTES / 4);  // of a group
constexpr int kRows = kWide ? 8 : 4;
constexpr int groups_of(int rows) { return kWide || rows == 1 ? 3 : rows == 2 ? 2 : 1; }

struct Tile {
  const void* w = nullptr;  // of the first group
  int64_t group = 0;        // bytes from group to group
  const float* x = nullptr;
  int64_t ldx = 0;    // from element to element of K
  int64_t depth = 0;  // of K, even
  float* c = nullptr;
  int64_t ldc = 0;
  bool add = false;
  const float* sw = nullptr;  // as in the AVX512_BF16 file
  const float* sx = nullptr;
  int64_t sx_ld = 0;
};

template <bool kPairs, int R, int G>
void micro(const Tile& t) {
  constexpr int V = kVectors;
  const Df d;
  const Du du;
  const size_t n = hn::Lanes(d);
  Vf acc[R][G * V];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int v = 0; v < G * V; ++v) acc[r][v] = hn::Zero(d);
  const auto* w = static_cast<const uint8_t*>(t.w);
  const float* x = t.x;
  const auto high = hn::Set(du, 0xffff0000u);
  for (int64_t k = 0; k < t.depth; k += kPairs ? 2 : 1) {
    Vf b[G * V];
#pragma GCC unroll 4
    for (int g = 0; g < G; ++g) {
      const auto* p = reinterpret_cast<const uint32_t*>(w + g * t.group);
      hwy::Prefetch(w + g * t.group + kAhead);
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) {
        const auto dwords = hn::Load(du, p + static_cast<size_t>(v) * n);
        b[g * V + v] = hn::BitCast(d, kPairs ? hn::ShiftLeft<16>(dwords) : dwords);
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const Vf a = hn::Set(d, x[r]);
#pragma GCC unroll 8
      for (int v = 0; v < G * V; ++v) acc[r][v] = hn::MulAdd(a, b[v], acc[r][v]);
    }
    x += t.ldx;
    if constexpr (kPairs) {
#pragma GCC unroll 4
      for (int g = 0; g < G; ++g) {
        const auto* p = reinterpret_cast<const uint32_t*>(w + g * t.group);
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v)
          b[g * V + v] =
              hn::BitCast(d, hn::And(hn::Load(du, p + static_cast<size_t>(v) * n), high));
      }
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        const Vf a = hn::Set(d, x[r]);
#pragma GCC unroll 8
        for (int v = 0; v < G * V; ++v) acc[r][v] = hn::MulAdd(a, b[v], acc[r][v]);
      }
      x += t.ldx;
    }
    w += 64;
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int v = 0; v < G * V; ++v) {
      float* c = t.c + r * t.ldc + static_cast<int64_t>(static_cast<size_t>(v) * n);
      Vf sum = acc[r][v];
      if (t.sw != nullptr) {
        const float sx = t.sx != nullptr ? t.sx[r * t.sx_ld] : 1.0F;
        sum = hn::Mul(sum, hn::Set(d, sx * t.sw[v / V]));
      }
      if (t.add) sum = hn::Add(sum, hn::LoadU(d, c));
      hn::StoreU(sum, d, c);
    }
}

// R rows against n groups.
template <bool kPairs, int R>
void strip(Tile t, int64_t n) {
  constexpr int kMost = groups_of(R);
  const auto next = [&t](int64_t g) {
    t.w = static_cast<const uint8_t*>(t.w) + g * t.group;
    t.c += 16 * g;
    if (t.sw != nullptr) t.sw += g;
  };
  for (; n >= kMost; n -= kMost, next(kMost)) micro<kPairs, R, kMost>(t);
  if constexpr (kMost > 2)
    if (n == 2) return micro<kPairs, R, 2>(t);
  if constexpr (kMost > 1)
    if (n == 1) micro<kPairs, R, 1>(t);
}
template <bool kPairs, int R>
void rows_of(const Tile& t, int64_t rows, int64_t n) {
  if constexpr (R > 1)
    if (rows < R) return rows_of<kPairs, R - 1>(t, rows, n);
  strip<kPairs, R>(t, n);
}
// Any number of rows, chunk by chunk of x; x_of(first row of the chunk, its rows).
template <bool kPairs, class F>
void all_rows(Tile t, int64_t m, int64_t n, F&& x_of) {
  float* c = t.c;
  const float* sx = t.sx;
  for (int64_t first = 0; first < m; first += kChunk) {
    const int64_t rows = std::min(kChunk, m - first);
    const float* x = x_of(first, rows);
    t.ldx = rows;
    for (int64_t r = 0; r < rows; r += kRows) {
      t.x = x + r, t.c = c + (first + r) * t.ldc;
      if (sx != nullptr) t.sx = sx + (first + r) * t.sx_ld;
      rows_of<kPairs, kRows>(t, std::min<int64_t>(kRows, rows - r), n);
    }
  }
}

// Lines of 16 outputs x 4 codes to four rows of 16 floats. Exponent and mantissa moved into place are the value times
// 2^-120, subnormals included, so one multiplication is exact for all codes but NaN.
void widen_codes(const uint8_t* p, int64_t lines, float* out) {
  const Df d;
  const Du du;
  const size_t n = hn::Lanes(d);
  const auto scale = hn::Set(d, 0x1p120F), nan = hn::BitCast(d, hn::Set(du, 0x7fc00000u));
  const hn::Repartition<uint8_t, Du> db;
  alignas(64) static constexpr uint8_t kDwords[64] = {
      0,  1,  8,  9,  2,  3,  10, 11, 4,  5,  12, 13, 6, 7, 14, 15, 0,  1,  8,  9, 2,  3,
      10, 11, 4,  5,  12, 13, 6,  7,  14, 15, 0,  1,  8, 9, 2,  3,  10, 11, 4,  5, 12, 13,
      6,  7,  14, 15, 0,  1,  8,  9,  2,  3,  10, 11, 4, 5, 12, 13, 6,  7,  14, 15};
  const auto order = hn::Load(db, kDwords);
  const auto put = [&](auto top, float* to) {  // the code in bits 31 to 24
    const auto mag = hn::And(top, hn::Set(du, 0x7f000000u));
    const auto bits = hn::Or(hn::ShiftRight<4>(mag), hn::And(top, hn::Set(du, 0x80000000u)));
    const auto v = hn::Mul(hn::BitCast(d, bits), scale);
    hn::StoreU(hn::IfThenElse(hn::RebindMask(d, hn::Eq(mag, hn::Set(du, 0x7f000000u))), nan, v), d,
               to);
  };
  for (int64_t i = 0; i < lines; ++i, p += 64, out += 64)
    for (size_t lane = 0; lane < 16; lane += n) {
      const auto packed = hn::BitCast(
          du, hn::TableLookupBytes(hn::Load(db, p + 4 * lane), order));  // four codes a dword
      const auto nibble = hn::Set(du, 0x0f0f0f0fu);
      const auto codes = hn::Or(hn::And(hn::ShiftRight<4>(packed), nibble),
                                hn::ShiftLeft<4>(hn::And(packed, nibble)));
      put(hn::ShiftLeft<24>(codes), out + lane);
      put(hn::ShiftLeft<16>(codes), out + 16 + lane);
      put(hn::ShiftLeft<8>(codes), out + 32 + lane);
      put(codes, out + 48 + lane);
    }
}

void product_codes(const PackedWeight& w, const PackedRows& x, int64_t g0, int64_t g1, float* c,
                   int64_t ldc, bool add) {
  constexpr int64_t kMost = 3;
  alignas(64) float wide[kMost][kBlock * 16];
  float sw[kMost];
  const int64_t depth = packed_depth(w.type, w.k), blocks = (w.k + kBlock - 1) / kBlock;
  const auto* data = static_cast<const uint8_t*>(w.data);
  const auto* xs = reinterpret_cast<const float*>(x.data);
  Tile t;
  t.w = wide, t.group = sizeof wide[0], t.ldc = ldc, t.sw = sw, t.sx_ld = x.scale_ld;
  for (int64_t g = g0, n = 0; g < g1; g += n) {
    n = std::min(x.m == 1 ? 1 : kMost, g1 - g);
    for (int64_t b = 0; b < blocks; ++b) {
      t.depth = std::min(kBlock, depth - b * kBlock);
      for (int64_t j = 0; j < n; ++j) {
        const uint8_t* from = data + ((g + j) * depth + b * kBlock) * 16;
        for (int64_t i = 0; i < t.depth * 16; i += 64) hwy::Prefetch(from + i + kAhead);
        widen_codes(from, t.depth / 4, wide[j]);
        sw[j] = packed_scale(w, g + j, b);
      }
      t.c = c + (g - g0) * 16, t.add = add || b > 0;
      t.sx = x.scale == nullptr ? nullptr : x.scale + b;
      all_rows<false>(t, x.m, n, [&](int64_t first, int64_t rows) {
        return xs + first * depth + b * kBlock * rows;
      });
    }
  }
}

template <bool kPairs>
void product_dwords(const PackedWeight& w, const PackedRows& x, int64_t g0, int64_t g1, float* c,
                    int64_t ldc, bool add) {
  const int64_t depth = packed_depth(w.type, w.k);
  const auto* data = static_cast<const uint8_t*>(w.data);
  const auto* xs = reinterpret_cast<const float*>(x.data);
  const int64_t most = x.m == 1 ? 1 : 3, block = x.m <= kChunk ? kDepth : kDepthMany;
  Tile t;
  t.group = packed_group_bytes(w.type, w.k), t.ldc = ldc;
  for (int64_t g = g0, n = 0; g < g1; g += n) {
    n = std::min(most, g1 - g);
    for (int64_t k = 0; k < depth; k += block) {
      t.w = data + g * t.group + k * (kPairs ? 32 : 64);
      t.depth = std::min(block, depth - k);
      t.c = c + (g - g0) * 16, t.add = add || k > 0;
      all_rows<kPairs>(t, x.m, n,
                       [&](int64_t first, int64_t rows) { return xs + first * depth + k * rows; });
    }
  }
}

void product(const PackedWeight& w, const PackedRows& x, int64_t g0, int64_t g1, float* c,
             int64_t ldc, bool add) {
  if (w.type == DType::f8e4m3) return product_codes(w, x, g0, g1, c, ldc, add);
  if (w.type == DType::bf16) return product_dwords<true>(w, x, g0, g1, c, ldc, add);
  product_dwords<false>(w, x, g0, g1, c, ldc, add);
}
const char* isa() { return hwy::TargetName(HWY_TARGET); }

}  // namespace
}  // namespace v3b::kern::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace v3b::kern {
namespace {
HWY_EXPORT(product);
HWY_EXPORT(isa);
}  // namespace

void packed_product_cpu_simd(const PackedWeight& w, const PackedRows& x, int64_t g0, int64_t g1,
                             float* c, int64_t ldc, bool add) noexcept {
  if (x.m > 0) HWY_DYNAMIC_DISPATCH(product)(w, x, g0, g1, c, ldc, add);
}
const char* packed_product_simd_isa() noexcept { return HWY_DYNAMIC_DISPATCH(isa)(); }

}  // namespace v3b::kern
#endif  // HWY_ONCE
