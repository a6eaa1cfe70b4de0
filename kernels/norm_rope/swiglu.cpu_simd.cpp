// SwiGLU: silu(a) = a / (1 + exp(-a)); Highway's exp is within 1 ulp and saturates, so large |a|
// give a or 0. Bandwidth-bound.
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/norm_rope/swiglu.cpu_simd.cpp"
#include "hwy/foreach_target.h"  // IWYU pragma: keep
//
#include "hwy/contrib/math/math-inl.h"
#include "hwy/highway.h"
#include "kernels/core/team.h"
#include "kernels/norm_rope/hwy_io-inl.h"
#include "kernels/norm_rope/swiglu.h"

#ifndef V3B_SWIGLU_ONCE
#define V3B_SWIGLU_ONCE
namespace v3b::kern {
namespace {
constexpr double kExpBytes = 16;  // an exponential costs about as much as moving so many bytes
}  // namespace
}  // namespace v3b::kern
#endif

HWY_BEFORE_NAMESPACE();
namespace v3b::kern::HWY_NAMESPACE {
namespace {

HWY_INLINE VF silu(DF df, VF a) {
  // exp(-a) is capped so that a very negative a gives -0 or a denormal, not a / inf * up = NaN for
  // up = inf.
  const VF e = hn::Exp(df, hn::Min(hn::Neg(a), hn::Set(df, 88.0F)));
  return hn::Div(a, hn::Add(hn::Set(df, 1.0F), e));
}

template <class X, class Y>
void swiglu_row(int64_t m, const X* g, const X* u, float scale, Y* y) {
  const DF df;
  const int64_t n = static_cast<int64_t>(hn::Lanes(df));
  const VF vs = hn::Set(df, scale);
  int64_t i = 0;
  for (; i + n <= m; i += n)
    store(df, hn::Mul(hn::Mul(silu(df, load(df, g + i)), load(df, u + i)), vs), y + i);
  if (i < m) {
    const size_t tail = static_cast<size_t>(m - i);
    store_tail(
        df, hn::Mul(hn::Mul(silu(df, load_tail(df, g + i, tail)), load_tail(df, u + i, tail)), vs),
        y + i, tail);
  }
}

template <class X, class Y>
void swiglu_rows(const spec::SwigluArgs& a) {
  const auto row = [&](int64_t t) {
    swiglu_row(a.m, static_cast<const X*>(a.gate) + t * a.in_stride,
               static_cast<const X*>(a.up) + t * a.in_stride,
               a.row_scale == nullptr ? 1.0F : a.row_scale[t],
               static_cast<Y*>(a.y) + t * a.y_stride);
  };
  const int threads = team_for(static_cast<double>(a.T) * static_cast<double>(a.m) * kExpBytes, 0);
  for_rows(a.T, threads, row);
}

void swiglu(const spec::SwigluArgs& a) {
  const bool xb = a.in_type == spec::DType::bf16, yb = a.out_type == spec::DType::bf16;
  if (xb && yb) return swiglu_rows<uint16_t, uint16_t>(a);
  if (xb) return swiglu_rows<uint16_t, float>(a);
  if (yb) return swiglu_rows<float, uint16_t>(a);
  swiglu_rows<float, float>(a);
}

const char* swiglu_target() { return hwy::TargetName(HWY_TARGET); }

}  // namespace
}  // namespace v3b::kern::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace v3b::kern {
namespace {
HWY_EXPORT(swiglu);
HWY_EXPORT(swiglu_target);
}  // namespace
void swiglu_cpu_simd(const spec::SwigluArgs& a) noexcept { HWY_DYNAMIC_DISPATCH(swiglu)(a); }
const char* swiglu_cpu_simd_isa() noexcept { return HWY_DYNAMIC_DISPATCH(swiglu_target)(); }
}  // namespace v3b::kern
#endif
