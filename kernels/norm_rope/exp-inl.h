// e^z with as few instructions as its use needs: where a core moves 10 bytes a cycle, exponentials bind before memory.
// z = n ln2 + r by adding and taking away a large number, a polynomial for e^r, the exponent put in by a shift.
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

constexpr float kExpLeast = -88.0F;  // e^z is 0 from here on

// z in [kExpLeast, 88]; NaN stays NaN. Relative error, beside half an ulp of z: 2e-7 + 3e-9 |z|.
HWY_INLINE VF exp_between(VF z) {
  const DF df;
  const hn::RebindToUnsigned<DF> du;
  constexpr float kBig = 0x1.8p23F + 127;  // ulp 1: its low bits are n + 127
  const VF t = hn::MulAdd(z, hn::Set(df, 1.44269504F), hn::Set(df, kBig));
  const VF r = hn::NegMulAdd(hn::Sub(t, hn::Set(df, kBig)), hn::Set(df, 0.693147181F), z);
  // least largest relative error on half of +-ln2: 1.1e-7
  VF p = hn::MulAdd(hn::Set(df, 0.00831247773F), r, hn::Set(df, 0.0418905504F));
  p = hn::MulAdd(p, r, hn::Set(df, 0.166671157F));
  p = hn::MulAdd(p, r, hn::Set(df, 0.499992281F));
  const VF one = hn::Set(df, 1.0F);
  p = hn::MulAdd(hn::MulAdd(p, r, one), r, one);
  return hn::Mul(p, hn::BitCast(df, hn::ShiftLeft<23>(hn::BitCast(du, t))));
}

// 1 + e^-a for a in [-86, 87], relative error 6e-6: as above, with the exponent added to the bits instead of multiplied.
HWY_INLINE VF one_plus_exp_of_minus(VF a) {
  const DF df;
  const hn::RebindToUnsigned<DF> du;
  constexpr float kBig = 0x1.8p23F;
  const VF t = hn::MulAdd(a, hn::Set(df, -1.44269504F), hn::Set(df, kBig));
  const VF r = hn::NegMulSub(hn::Sub(t, hn::Set(df, kBig)), hn::Set(df, 0.693147181F), a);
  const VF one = hn::Set(df, 1.0F);
  VF p = hn::MulAdd(hn::Set(df, 0.0412769876F), r, hn::Set(df, 0.16753687F));
  p = hn::MulAdd(p, r, hn::Set(df, 0.500051379F));
  p = hn::MulAdd(hn::MulAdd(p, r, one), r, one);
  const auto e = hn::Add(hn::BitCast(du, p), hn::ShiftLeft<23>(hn::BitCast(du, t)));
  return hn::Add(one, hn::BitCast(df, e));
}

// The larger (smaller) of a bound and v; NaN stays: x86 gives the second operand then.
HWY_INLINE VF at_least(float bound, VF v) { return hn::Max(hn::Set(DF(), bound), v); }
HWY_INLINE VF at_most(float bound, VF v) { return hn::Min(hn::Set(DF(), bound), v); }

}  // namespace
}  // namespace v3b::kern::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();
#endif
