// e^z with as few instructions as its use needs: where a core moves 10 bytes a cycle, exponentials bind before memory.
// z = n ln2 + r by adding and taking away a large number, a polynomial for e^r, the exponent put in by a shift. With
// AVX-512 steps of ln2 / 32 and a table in two registers: two or three multiplications less, on the pipe that binds.
// Per-target header: included again for every target, no include guard in the usual sense.
#if defined(V3B_KERNELS_NORM_ROPE_EXP_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef V3B_KERNELS_NORM_ROPE_EXP_INL_H_
#undef V3B_KERNELS_NORM_ROPE_EXP_INL_H_
#else
#define V3B_KERNELS_NORM_ROPE_EXP_INL_H_
#endif

#include "hwy/highway.h"
#include "kernels/norm_rope/hwy_io-inl.h"

HWY_BEFORE_NAMESPACE();
namespace v3b::kern::HWY_NAMESPACE {
namespace {

constexpr float kExpLeast = -88.03F;  // e^z is 0 from here on

#if HWY_TARGET <= HWY_AVX3
// 2^(j/32) for the low five bits j of t (VPERMI2PS looks at no others), times 2^n for the bits above them: a row holds
// the bits of 2^(j/32) less those that j itself puts there. kShort: times 1 + h^2 / 4 with h = ln2 / 64, so that the
// error of 1 + r for e^r is as large on both sides.
alignas(64) constexpr uint32_t kPow2[32] = {
    0x3f800000, 0x3f7ecd87, 0x3f7daac3, 0x3f7c980f, 0x3f7b95c2, 0x3f7aa43a, 0x3f79c3d3, 0x3f78f4f0,
    0x3f7837f0, 0x3f778d3a, 0x3f76f532, 0x3f767043, 0x3f75fed7, 0x3f75a15b, 0x3f75583f, 0x3f7523f6,
    0x3f7504f3, 0x3f74fbaf, 0x3f7508a4, 0x3f752c4d, 0x3f75672a, 0x3f75b9be, 0x3f76248c, 0x3f76a81e,
    0x3f7744fd, 0x3f77fbb8, 0x3f78ccdf, 0x3f79b907, 0x3f7ac0c7, 0x3f7be4ba, 0x3f7d257d, 0x3f7e83b3};
alignas(64) constexpr uint32_t kPow2Short[32] = {
    0x3f8000f6, 0x3f7ece82, 0x3f7dabc4, 0x3f7c9915, 0x3f7b96ce, 0x3f7aa54c, 0x3f79c4ec, 0x3f78f60e,
    0x3f783915, 0x3f778e65, 0x3f76f664, 0x3f76717b, 0x3f760016, 0x3f75a2a1, 0x3f75598c, 0x3f75254a,
    0x3f75064f, 0x3f74fd13, 0x3f750a0f, 0x3f752dc0, 0x3f7568a5, 0x3f75bb41, 0x3f762618, 0x3f76a9b2,
    0x3f77469a, 0x3f77fd5e, 0x3f78ce8f, 0x3f79bac0, 0x3f7ac28a, 0x3f7be687, 0x3f7d2754, 0x3f7e8594};
HWY_INLINE VF pow2_of_32nds(const uint32_t (&table)[32], VF t) {
  const hn::RebindToUnsigned<DF> du;
  const auto bits = hn::BitCast(du, t);
  const decltype(bits) row{
      _mm512_permutex2var_epi32(_mm512_load_si512(table), bits.raw, _mm512_load_si512(table + 16))};
  return hn::BitCast(DF(), hn::Add(row, hn::ShiftLeft<18>(bits)));
}
#endif

// z in [kExpLeast, 88]; NaN stays NaN. Relative error, beside half an ulp of z: 2e-7 + 3e-9 |z|.
HWY_INLINE VF exp_between(VF z) {
  const DF df;
#if HWY_TARGET <= HWY_AVX3
  constexpr float kBig = 0x1.8p23F;  // ulp 1: the low bits of t are 32 n + j
  const VF t = hn::MulAdd(z, hn::Set(df, 46.1662413F), hn::Set(df, kBig));
  const VF r = hn::NegMulAdd(hn::Sub(t, hn::Set(df, kBig)), hn::Set(df, 0.0216608494F), z);
  const VF e = pow2_of_32nds(kPow2, t);
  // |r| < h = ln2 / 64: r^3 / 6, nearest by a line, is h^2 / 8 r, and 5e-8 are left
  const VF p = hn::MulAdd(hn::Set(df, 0.5F), r, hn::Set(df, 1.00001466F));
  return hn::MulAdd(hn::Mul(e, r), p, e);
#else
  const hn::RebindToUnsigned<DF> du;
  const VF one = hn::Set(df, 1.0F);
  constexpr float kBig = 0x1.8p23F + 127;  // ulp 1: its low bits are n + 127
  const VF t = hn::MulAdd(z, hn::Set(df, 1.44269504F), hn::Set(df, kBig));
  const VF r = hn::NegMulAdd(hn::Sub(t, hn::Set(df, kBig)), hn::Set(df, 0.693147181F), z);
  // least largest relative error on half of +-ln2: 1.1e-7
  VF p = hn::MulAdd(hn::Set(df, 0.00831247773F), r, hn::Set(df, 0.0418905504F));
  p = hn::MulAdd(p, r, hn::Set(df, 0.166671157F));
  p = hn::MulAdd(p, r, hn::Set(df, 0.499992281F));
  p = hn::MulAdd(hn::MulAdd(p, r, one), r, one);
  return hn::Mul(p, hn::BitCast(df, hn::ShiftLeft<23>(hn::BitCast(du, t))));
#endif
}

// 1 + e^-a for a in [-86, 87]. Relative error 3e-5 with the table; else 6e-6: as above, with the exponent added to the bits
// instead of multiplied.
HWY_INLINE VF one_plus_exp_of_minus(VF a) {
  const DF df;
  const VF one = hn::Set(df, 1.0F);
  constexpr float kBig = 0x1.8p23F;
#if HWY_TARGET <= HWY_AVX3
  const VF t = hn::MulAdd(a, hn::Set(df, -46.1662413F), hn::Set(df, kBig));
  const VF minus_r = hn::MulAdd(hn::Sub(t, hn::Set(df, kBig)), hn::Set(df, 0.0216608494F), a);
  const VF e = pow2_of_32nds(kPow2Short, t);
  return hn::NegMulAdd(e, minus_r, hn::Add(e, one));
#else
  const hn::RebindToUnsigned<DF> du;
  const VF t = hn::MulAdd(a, hn::Set(df, -1.44269504F), hn::Set(df, kBig));
  const VF r = hn::NegMulSub(hn::Sub(t, hn::Set(df, kBig)), hn::Set(df, 0.693147181F), a);
  VF p = hn::MulAdd(hn::Set(df, 0.0412769876F), r, hn::Set(df, 0.16753687F));
  p = hn::MulAdd(p, r, hn::Set(df, 0.500051379F));
  p = hn::MulAdd(hn::MulAdd(p, r, one), r, one);
  const auto e = hn::Add(hn::BitCast(du, p), hn::ShiftLeft<23>(hn::BitCast(du, t)));
  return hn::Add(one, hn::BitCast(df, e));
#endif
}

// The larger (smaller) of a bound and v; NaN stays: x86 gives the second operand then.
HWY_INLINE VF at_least(float bound, VF v) { return hn::Max(hn::Set(DF(), bound), v); }
HWY_INLINE VF at_most(float bound, VF v) { return hn::Min(hn::Set(DF(), bound), v); }

}  // namespace
}  // namespace v3b::kern::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();
#endif
