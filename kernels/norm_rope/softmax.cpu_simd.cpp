// Softmax of rows (SPEC 1.5), with the logarithm of the sum if asked for. Bandwidth-bound for rows
// beyond the caches, else bound by the exponentials.
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/norm_rope/softmax.cpu_simd.cpp"
#include "hwy/foreach_target.h"  // IWYU pragma: keep
//
#include <algorithm>
#include <cmath>
#include <limits>

#include "hwy/contrib/math/math-inl.h"
#include "hwy/highway.h"
#include "kernels/core/team.h"
#include "kernels/norm_rope/hwy_io-inl.h"
#include "kernels/norm_rope/swiglu.h"

#ifndef V3B_SOFTMAX_ONCE
#define V3B_SOFTMAX_ONCE
namespace v3b::kern {
namespace {
constexpr double kExpBytes = 16;     // an exponential costs about as much as moving so many bytes
constexpr int64_t kSumBlock = 1024;  // a multiple of every vector length
}  // namespace
}  // namespace v3b::kern
#endif

HWY_BEFORE_NAMESPACE();
namespace v3b::kern::HWY_NAMESPACE {
namespace {

// Three passes: maximum, exponentials with their sum, scale. A NaN anywhere in a row makes the row
// NaN.
void softmax_row(int64_t n_row, float scale, const float* x, float* y, float* lse) {
  const DF df;
  const int64_t n = static_cast<int64_t>(hn::Lanes(df));
  constexpr float kNegInf = -std::numeric_limits<float>::infinity();
  const VF vs = hn::Set(df, scale);
  VF m0 = hn::Set(df, kNegInf);
  int64_t i = 0;
  for (; i + n <= n_row; i += n) m0 = hn::Max(m0, hn::Mul(vs, hn::LoadU(df, x + i)));
  float mx = hn::GetLane(hn::MaxOfLanes(df, m0));
  for (; i < n_row; ++i) mx = std::fmax(mx, scale * x[i]);
  const VF vm = hn::Set(df, mx);
  double total = 0;  // f32 within a block, double across: a plain f32 sum of 1e5 terms loses 5e-6
  for (i = 0; i + n <= n_row;) {
    VF s0 = hn::Zero(df);
    for (const int64_t stop = std::min(n_row, i + kSumBlock); i + n <= stop; i += n) {
      const VF z = hn::MulSub(vs, hn::LoadU(df, x + i), vm);
      const VF e = hn::IfThenElse(hn::IsNaN(z), z, hn::Exp(df, z));
      s0 = hn::Add(s0, e);
      if (y != nullptr) hn::StoreU(e, df, y + i);
    }
    total += sum(df, s0);
  }
  if (i < n_row) {
    const size_t tail = static_cast<size_t>(n_row - i);
    const VF z = hn::MulSub(vs, load_tail(df, x + i, tail, scale < 0 ? 3e38F : -3e38F), vm);
    const VF e = hn::IfThenElse(hn::IsNaN(z), z, hn::Exp(df, z));
    total += sum(df, hn::IfThenElseZero(hn::FirstN(df, tail), e));
    if (y != nullptr) store_tail(df, e, y + i, tail);
  }
  if (lse != nullptr) *lse = mx + static_cast<float>(std::log(total));
  if (y == nullptr) return;
  const float inverse = static_cast<float>(1.0 / total);
  const VF inv = hn::Set(df, inverse);
  for (i = 0; i + n <= n_row; i += n) hn::StoreU(hn::Mul(inv, hn::LoadU(df, y + i)), df, y + i);
  for (; i < n_row; ++i) y[i] *= inverse;
}

void softmax(const spec::SoftmaxArgs& a) {
  const auto row = [&](int64_t t) {
    softmax_row(a.n, static_cast<float>(a.scale), a.x + t * a.x_stride,
                a.y == nullptr ? nullptr : a.y + t * a.y_stride,
                a.lse == nullptr ? nullptr : a.lse + t);
  };
  const int threads = team_for(static_cast<double>(a.T) * static_cast<double>(a.n) * kExpBytes, 0);
  for_rows(a.T, threads, row);
}
const char* softmax_target() { return hwy::TargetName(HWY_TARGET); }

}  // namespace
}  // namespace v3b::kern::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace v3b::kern {
namespace {
HWY_EXPORT(softmax);
HWY_EXPORT(softmax_target);
}  // namespace
void softmax_cpu_simd(const spec::SoftmaxArgs& a) noexcept { HWY_DYNAMIC_DISPATCH(softmax)(a); }
const char* softmax_cpu_simd_isa() noexcept { return HWY_DYNAMIC_DISPATCH(softmax_target)(); }
}  // namespace v3b::kern
#endif
