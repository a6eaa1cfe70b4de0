// SwiGLU, softmax rows and the embedding gather. silu(a) = a / (1 + exp(-a)); Highway's exp is
// within 1 ulp and saturates, so large |a| give a or 0. All are bandwidth-bound.
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/norm_rope/swiglu.cpu_simd.cpp"
#include "hwy/foreach_target.h"  // IWYU pragma: keep
//
#include <omp.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "hwy/contrib/math/math-inl.h"
#include "hwy/highway.h"
#include "kernels/core/team.h"
#include "kernels/norm_rope/hwy_io-inl.h"
#include "kernels/norm_rope/swiglu.h"

#ifndef V3B_SWIGLU_ONCE
#define V3B_SWIGLU_ONCE
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
  if (a.T == 1 || threads == 1) {
    for (int64_t t = 0; t < a.T; ++t) row(t);
    return;
  }
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t t = 0; t < a.T; ++t) row(t);
}

void swiglu(const spec::SwigluArgs& a) {
  const bool xb = a.in_type == spec::DType::bf16, yb = a.out_type == spec::DType::bf16;
  if (xb && yb) return swiglu_rows<uint16_t, uint16_t>(a);
  if (xb) return swiglu_rows<uint16_t, float>(a);
  if (yb) return swiglu_rows<float, uint16_t>(a);
  swiglu_rows<float, float>(a);
}

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
  if (a.T == 1 || threads == 1) {
    for (int64_t t = 0; t < a.T; ++t) row(t);
    return;
  }
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t t = 0; t < a.T; ++t) row(t);
}
const char* swiglu_target() { return hwy::TargetName(HWY_TARGET); }

}  // namespace
}  // namespace v3b::kern::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace v3b::kern {
namespace {
HWY_EXPORT(swiglu);
HWY_EXPORT(softmax);
HWY_EXPORT(swiglu_target);
}  // namespace
void swiglu_cpu_simd(const spec::SwigluArgs& a) noexcept { HWY_DYNAMIC_DISPATCH(swiglu)(a); }
void softmax_cpu_simd(const spec::SoftmaxArgs& a) noexcept { HWY_DYNAMIC_DISPATCH(softmax)(a); }
const char* swiglu_cpu_simd_isa() noexcept { return HWY_DYNAMIC_DISPATCH(swiglu_target)(); }
const char* softmax_cpu_simd_isa() noexcept { return HWY_DYNAMIC_DISPATCH(swiglu_target)(); }

void embedding_cpu(const spec::EmbeddingArgs& a) noexcept {
  const int64_t row = a.d * spec::dtype_bytes(a.dtype);
  const char* table = static_cast<const char*>(a.table);
  char* y = static_cast<char*>(a.y);
#pragma omp parallel for schedule(static) if (a.T > 1 && a.T * row >= (1 << 17) && \
                                              omp_in_parallel() == 0)
  for (int64_t t = 0; t < a.T; ++t)
    std::memcpy(y + t * row, table + a.ids[t] * row, static_cast<size_t>(row));
}
}  // namespace v3b::kern
#endif
