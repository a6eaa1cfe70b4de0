// Tiles of floats (Highway: AVX2, AVX-512 without bf16 products, and float operands at every level), and what brings
// bf16, FP8 and float operands into floats.
//
// Bound: a step of R rows x V vectors is V loads of Q, R broadcast loads of P and R*V multiply-adds. AVX-512: 8 x 3
// or 6 x 4 of 32 registers, 11 loads for 24; AVX2: 6 x 2 of 16 registers, 8 loads for 12 (two a cycle: 6 cycles).
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/gemm/gemm_tile.cpu_simd.cpp"
#include <hwy/foreach_target.h>  // IWYU pragma: keep
//
#include <hwy/highway.h>

#include <algorithm>
#include <cstring>

#include "kernels/core/cpu.h"
#include "kernels/gemm/fp8.h"
#include "kernels/gemm/tile.h"

HWY_BEFORE_NAMESPACE();
namespace v3b::kern::HWY_NAMESPACE {
namespace {
namespace hn = hwy::HWY_NAMESPACE;
using Df = hn::CappedTag<float, 16>;
using Vf = hn::Vec<Df>;

// R rows x V vectors of which `lanes` lanes are real.
template <int R, int V>
void micro(const TileArgs& t, int64_t r0, int64_t l0) {
  const Df d;
  const int64_t n = static_cast<int64_t>(hn::Lanes(d));
  Vf acc[R][V];
  const float* q[V];
#pragma GCC unroll 16
  for (int v = 0; v < V; ++v) {
    const int64_t l = l0 + v * n;
    q[v] = reinterpret_cast<const float*>(t.q) + l / 16 * t.q_group + l % 16;
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) acc[r][v] = hn::Zero(d);
  }
  const float* p = reinterpret_cast<const float*>(t.p) + r0 * t.p_row;
  for (int64_t s = 0; s < t.steps; ++s, p += t.p_step) {
    Vf b[V];
#pragma GCC unroll 16
    for (int v = 0; v < V; ++v) b[v] = hn::LoadU(d, q[v] + 16 * s);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const Vf a = hn::Set(d, p[r * t.p_row]);
#pragma GCC unroll 16
      for (int v = 0; v < V; ++v) acc[r][v] = hn::MulAdd(a, b[v], acc[r][v]);
    }
  }
#pragma GCC unroll 16
  for (int v = 0; v < V; ++v) {
    const int64_t l = l0 + v * n;
    const size_t left = static_cast<size_t>(std::clamp<int64_t>(t.lanes - l, 0, n));
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      float* c = t.c + (r0 + r) * t.ldc + l;
      Vf sum = acc[r][v];
      if (t.scale != nullptr) sum = hn::Mul(sum, hn::LoadU(d, t.scale + l));
      if (left == static_cast<size_t>(n)) {
        if (t.add) sum = hn::Add(sum, hn::LoadU(d, c));
        hn::StoreU(sum, d, c);
      } else if (left > 0) {
        HWY_ALIGN float part[16] = {};
        hn::Store(sum, d, part);
        for (size_t i = 0; i < left; ++i) c[i] = t.add ? c[i] + part[i] : part[i];
      }
    }
  }
}

template <int R, int V>
int64_t strips(const TileArgs& t, int64_t r, int64_t l) {
  for (; r + R <= t.rows; r += R) micro<R, V>(t, r, l);
  return r;
}
template <int V>
void panel(const TileArgs& t, int64_t l) {
  int64_t r = 0;
  if constexpr (HWY_MAX_BYTES >= 64 && V <= 3) r = strips<8, V>(t, r, l);
  r = strips<6, V>(t, r, l);
  r = strips<2, V>(t, r, l);
  strips<1, V>(t, r, l);
}

void tile(const TileArgs& t) {
  const int64_t n = static_cast<int64_t>(hn::Lanes(Df()));
  if constexpr (HWY_MAX_BYTES >= 64) {
    const int64_t groups = (t.lanes + 15) / 16;
    for (int64_t g = 0; g < groups;) {
      const int64_t left = groups - g;
      if (left == 4 || left > 5) {
        panel<4>(t, g * 16), g += 4;
      } else if (left == 5 || left == 3) {
        panel<3>(t, g * 16), g += 3;
      } else if (left == 2) {
        panel<2>(t, g * 16), g += 2;
      } else {
        panel<1>(t, g * 16), g += 1;
      }
    }
  } else {
    int64_t l = 0;
    for (; l + n < t.lanes; l += 2 * n) panel<2>(t, l);
    for (; l < t.lanes; l += n) panel<1>(t, l);
  }
}

const char* isa() { return hwy::TargetName(HWY_TARGET); }

// n elements of a row as floats.
void widen(const void* src, spec::DType type, int64_t n, float* out) {
  if (type == spec::DType::f32) {
    std::memcpy(out, src, static_cast<size_t>(n) * 4);
    return;
  }
  const Df d;
  const int64_t lanes = static_cast<int64_t>(hn::Lanes(d));
  int64_t i = 0;
  if (type == spec::DType::bf16) {
    const hn::Rebind<hwy::bfloat16_t, Df> dh;
    const auto* p = static_cast<const hwy::bfloat16_t*>(src);
    for (; i + lanes <= n; i += lanes)
      hn::StoreU(hn::PromoteTo(d, hn::LoadU(dh, p + i)), d, out + i);
    for (; i < n; ++i) out[i] = spec::to_float(static_cast<const spec::bf16*>(src)[i]);
    return;
  }
  // E4M3: the code's exponent and mantissa moved into place are the value times 2^-120, subnormals included, so one
  // multiplication is exact for all codes but NaN.
  const hn::RebindToUnsigned<Df> du;
  const hn::Rebind<uint8_t, Df> d8;
  const auto* p = static_cast<const uint8_t*>(src);
  const auto scale = hn::Set(d, 0x1p120F);
  const auto nan = hn::BitCast(d, hn::Set(du, 0x7fc00000u));
  for (; i + lanes <= n; i += lanes) {
    const auto c = hn::PromoteTo(du, hn::LoadU(d8, p + i));
    const auto mag = hn::And(c, hn::Set(du, 0x7fu));
    const auto sign = hn::ShiftLeft<24>(hn::And(c, hn::Set(du, 0x80u)));
    auto v = hn::Mul(hn::BitCast(d, hn::Or(hn::ShiftLeft<20>(mag), sign)), scale);
    v = hn::IfThenElse(hn::RebindMask(d, hn::Eq(mag, hn::Set(du, 0x7fu))), nan, v);
    hn::StoreU(v, d, out + i);
  }
  for (; i < n; ++i) out[i] = spec::to_float(spec::f8e4m3{p[i]});
}

}  // namespace
}  // namespace v3b::kern::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace v3b::kern {
namespace {
HWY_EXPORT(tile);
HWY_EXPORT(widen);
HWY_EXPORT(isa);

using spec::DType;

const uint8_t* at(const void* p, int64_t elements, DType t) {
  return static_cast<const uint8_t*>(p) + elements * spec::dtype_bytes(t);
}
constexpr int64_t kChunk = 64;  // of a row widened at a time
}  // namespace

void tile_f32_cpu_simd(const TileArgs& t) noexcept { HWY_DYNAMIC_DISPATCH(tile)(t); }
const char* tile_f32_isa() noexcept { return HWY_DYNAMIC_DISPATCH(isa)(); }
void tile_widen_cpu_simd(const void* src, DType type, int64_t n, float* out) noexcept {
  HWY_DYNAMIC_DISPATCH(widen)(src, type, n, out);
}

void tile_pack_lanes_f32_cpu_simd(const PackArgs& a) noexcept {
  const int64_t steps = tile_steps(TileForm::f32, a.k);
  auto* out = reinterpret_cast<float*>(a.out);
  for (int64_t l = 0; l < a.count; l += 16) {
    float* to = out + l / 16 * a.out_group;
    const int64_t valid = std::min<int64_t>(16, a.count - l);
    if (a.k_major) {
      for (int64_t s = 0; s < steps; ++s) {
        float* row = to + s * a.out_step;
        const int64_t n = s < a.k ? valid : 0;
        if (n > 0) tile_widen_cpu_simd(at(a.src, s * a.ld + l, a.type), a.type, n, row);
        std::fill(row + n, row + 16, 0.0F);
      }
      continue;
    }
    alignas(64) float rows[16][kChunk];
    for (int64_t s0 = 0; s0 < steps; s0 += kChunk) {
      const int64_t wanted = std::min(kChunk, steps - s0),
                    n = std::clamp<int64_t>(a.k - s0, 0, wanted);
      for (int64_t i = 0; i < 16; ++i) {
        const bool real = i < valid && n > 0;
        const int64_t row = !real ? 0 : a.index != nullptr ? a.index[l + i] : l + i;
        if (real) tile_widen_cpu_simd(at(a.src, row * a.ld + s0, a.type), a.type, n, rows[i]);
        std::fill(rows[i] + (real ? n : 0), rows[i] + wanted, 0.0F);
      }
      for (int64_t s = 0; s < wanted; ++s)
        for (int64_t i = 0; i < 16; ++i) to[(s0 + s) * a.out_step + i] = rows[i][s];
    }
  }
}

void tile_pack_rows_f32_cpu_simd(const PackArgs& a) noexcept {
  const int64_t steps = tile_steps(TileForm::f32, a.k);
  auto* out = reinterpret_cast<float*>(a.out);
  if (a.k_major) {
    const int64_t padded = (a.count + 15) / 16 * 16;
    for (int64_t s = 0; s < steps; ++s) {
      float* row = out + s * a.out_step;
      const int64_t n = s < a.k ? a.count : 0;
      if (n > 0) tile_widen_cpu_simd(at(a.src, s * a.ld, a.type), a.type, n, row);
      std::fill(row + n, row + padded, 0.0F);
    }
    return;
  }
  for (int64_t i = 0; i < a.count; ++i) {
    const int64_t row = a.index != nullptr ? a.index[i] : i;
    float* to = out + i * a.out_step;
    tile_widen_cpu_simd(at(a.src, row * a.ld, a.type), a.type, a.k, to);
    std::fill(to + a.k, to + steps, 0.0F);
  }
}

}  // namespace v3b::kern
#endif  // HWY_ONCE
