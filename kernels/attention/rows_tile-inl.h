// The register tile of rows.h in Highway, and exp2. Per-target header: included once for every
// instruction set.
// clang-format off
#if defined(V3B_ROWS_TILE_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef V3B_ROWS_TILE_INL_H_
#undef V3B_ROWS_TILE_INL_H_
#else
#define V3B_ROWS_TILE_INL_H_
#endif
// clang-format on

#include <cstdint>
#include <cstring>

#include "hwy/highway.h"
#include "kernels/attention/rows.h"

HWY_BEFORE_NAMESPACE();
namespace v3b::kern::HWY_NAMESPACE {
namespace {
namespace hn = hwy::HWY_NAMESPACE;

using DF = hn::ScalableTag<float>;
using DI = hn::RebindToSigned<DF>;
using DU = hn::RebindToUnsigned<DF>;
using VF = hn::Vec<DF>;
using VU = hn::Vec<DU>;
constexpr int64_t kLanes = static_cast<int64_t>(hn::MaxLanes(DF()));
constexpr bool kManyRegs = kLanes == 16;    // 32 vector registers with AVX-512, else 16
constexpr int64_t kNr = kManyRegs ? 4 : 2;  // vectors of a panel
constexpr int64_t kPanel = kNr * kLanes;

// Rows of a tile so that accumulators, B vectors and one or two temporaries fit the registers. A
// bf16 pair costs two float vectors for each B vector.
constexpr int tile_rows(bool bf16, int nr) {
  if (kManyRegs)
    return bf16 ? (nr == 4   ? 4
                   : nr == 3 ? 6
                   : nr == 2 ? 8
                             : 16)
                : (nr == 4   ? 6
                   : nr == 3 ? 8
                   : nr == 2 ? 12
                             : 16);
  return bf16 ? (nr == 2 ? 4 : 8) : (nr == 2 ? 6 : 8);
}

// bf16 pairs: the even element is the low half.
HWY_INLINE VF pair_even(VU x) { return hn::BitCast(DF(), hn::ShiftLeft<16>(x)); }
HWY_INLINE VF pair_odd(VU x) { return hn::BitCast(DF(), hn::And(x, hn::Set(DU(), 0xffff0000u))); }

template <bool kBf16, int MR, int NR>
HWY_INLINE void tile(const char* a, int64_t a_m, int64_t a_k, const char* b, int64_t K, float* c,
                     int64_t ldc, const float* c_scale) {
  const DF df;
  const DU du;
  VF acc[MR][NR];
#pragma GCC unroll 16
  for (int m = 0; m < MR; ++m) {
#pragma GCC unroll 4
    for (int n = 0; n < NR; ++n)
      acc[m][n] = c_scale
                      ? hn::Mul(hn::Set(df, c_scale[m]), hn::LoadU(df, c + m * ldc + n * kLanes))
                      : hn::Zero(df);
  }
  for (int64_t k = 0; k < K; ++k) {
    VF b0[NR], b1[NR];
#pragma GCC unroll 4
    for (int n = 0; n < NR; ++n) {
      const VU u = hn::LoadU(du, reinterpret_cast<const uint32_t*>(b) + n * kLanes);
      b0[n] = kBf16 ? pair_even(u) : hn::BitCast(df, u);
      if constexpr (kBf16) b1[n] = pair_odd(u);
    }
#pragma GCC unroll 16
    for (int m = 0; m < MR; ++m) {
      uint32_t unit;
      std::memcpy(&unit, a + m * a_m, 4);
      const VU va = hn::Set(du, unit);
      const VF a0 = kBf16 ? pair_even(va) : hn::BitCast(df, va);
#pragma GCC unroll 4
      for (int n = 0; n < NR; ++n) acc[m][n] = hn::MulAdd(a0, b0[n], acc[m][n]);
      if constexpr (kBf16) {
        const VF a1 = pair_odd(va);
#pragma GCC unroll 4
        for (int n = 0; n < NR; ++n) acc[m][n] = hn::MulAdd(a1, b1[n], acc[m][n]);
      }
    }
    a += a_k;
    b += 4 * NR * kLanes;
  }
#pragma GCC unroll 16
  for (int m = 0; m < MR; ++m) {
#pragma GCC unroll 4
    for (int n = 0; n < NR; ++n) hn::StoreU(acc[m][n], df, c + m * ldc + n * kLanes);
  }
}

template <bool kBf16, int NR>
HWY_NOINLINE void tile_panel(int64_t M, const char* a, int64_t a_m, int64_t a_k, const char* b,
                             int64_t K, float* c, int64_t ldc, const float* cs) {
  constexpr int MR = tile_rows(kBf16, NR);
  int64_t m = 0;
  const auto scale_at = [&](int64_t i) { return cs ? cs + i : nullptr; };
  for (; m + MR <= M; m += MR)
    tile<kBf16, MR, NR>(a + m * a_m, a_m, a_k, b, K, c + m * ldc, ldc, scale_at(m));
  for (; MR > 4 && m + 4 <= M; m += 4)
    tile<kBf16, 4, NR>(a + m * a_m, a_m, a_k, b, K, c + m * ldc, ldc, scale_at(m));
  for (; m + 2 <= M; m += 2)
    tile<kBf16, 2, NR>(a + m * a_m, a_m, a_k, b, K, c + m * ldc, ldc, scale_at(m));
  for (; m < M; ++m) tile<kBf16, 1, NR>(a + m * a_m, a_m, a_k, b, K, c + m * ldc, ldc, scale_at(m));
}

template <bool kBf16>
void tile_any(int64_t M, const void* a, int64_t a_m, int64_t a_k, const void* b, int64_t nv,
              int64_t K, float* c, int64_t ldc, const float* cs, Ahead) {
  const char* pa = static_cast<const char*>(a);
  const char* pb = static_cast<const char*>(b);
  if (nv == 1) return tile_panel<kBf16, 1>(M, pa, a_m, a_k, pb, K, c, ldc, cs);
  if constexpr (kNr >= 4) {
    if (nv == 3) return tile_panel<kBf16, 3>(M, pa, a_m, a_k, pb, K, c, ldc, cs);
    if (nv == 4) return tile_panel<kBf16, 4>(M, pa, a_m, a_k, pb, K, c, ldc, cs);
  }
  return tile_panel<kBf16, 2>(M, pa, a_m, a_k, pb, K, c, ldc, cs);
}

// 2^x for x <= 0 (NaN stays NaN; below 2^-126 exactly 0). Taylor of degree 7 on [-1/2, 1/2]: 5e-9
// relative.
HWY_INLINE VF exp2_neg(VF x) {
  const DF df;
  const DI di;
  const VF lowest = hn::Set(df, -126.0f);
  const VF n = hn::Round(hn::Max(x, lowest));
  const VF r = hn::Sub(x, n);
  VF p = hn::Set(df, 1.5252734e-5f);
  p = hn::MulAdd(p, r, hn::Set(df, 1.5403530e-4f));
  p = hn::MulAdd(p, r, hn::Set(df, 1.3333558e-3f));
  p = hn::MulAdd(p, r, hn::Set(df, 9.6181291e-3f));
  p = hn::MulAdd(p, r, hn::Set(df, 5.5504109e-2f));
  p = hn::MulAdd(p, r, hn::Set(df, 2.4022651e-1f));
  p = hn::MulAdd(p, r, hn::Set(df, 6.9314718e-1f));
  p = hn::MulAdd(p, r, hn::Set(df, 1.0f));
  const auto bits = hn::ShiftLeft<23>(hn::Add(hn::ConvertTo(di, n), hn::Set(di, 127)));
  const VF y = hn::Mul(p, hn::BitCast(df, bits));
  return hn::IfThenZeroElse(hn::Lt(x, lowest), y);
}

}  // namespace
}  // namespace v3b::kern::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();
#endif
