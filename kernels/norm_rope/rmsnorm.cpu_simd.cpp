// RMSNorm in two passes over a row: sum of squares in f32 lanes, then scale. A row of 7168 fits the
// L1 or L2 cache, so memory sees each operand once; the kernel is bandwidth-bound for T rows and
// latency-bound for one row.
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/norm_rope/rmsnorm.cpu_simd.cpp"
#include "hwy/foreach_target.h"  // IWYU pragma: keep
//
#include <cmath>

#include "hwy/highway.h"
#include "kernels/core/team.h"
#include "kernels/norm_rope/hwy_io-inl.h"
#include "kernels/norm_rope/rmsnorm.h"

#ifndef V3B_RMSNORM_ONCE
#define V3B_RMSNORM_ONCE
namespace v3b::kern {
namespace {
struct Job {
  int64_t T, d;
  float eps;
  bool hf;
  int x_type, w_type, y_type;  // 0 f32, 1 bf16
  const void* x;
  int64_t x_stride;
  void* r;  // residual, in the dtype of x, dense rows; or null
  const void* w;
  void* y;
  int64_t y_stride;
};
}  // namespace
}  // namespace v3b::kern
#endif

HWY_BEFORE_NAMESPACE();
namespace v3b::kern::HWY_NAMESPACE {
namespace {

template <class X, class W, class Y>
void norm_row(const Job& j, const X* x, X* r, const W* w, Y* y) {
  const DF df;
  const int64_t n = static_cast<int64_t>(hn::Lanes(df)), d = j.d, body = d / n * n;
  const size_t tail = static_cast<size_t>(d - body);
  VF s0 = hn::Zero(df), s1 = hn::Zero(df);
  int64_t i = 0;
  if (r != nullptr) {
    for (; i < body; i += n) {
      store(df, hn::Add(load(df, x + i), load(df, r + i)), r + i);
      const VF v = load(df, r + i);
      s0 = hn::MulAdd(v, v, s0);
    }
    if (tail > 0) {
      store_tail(df, hn::Add(load_tail(df, x + i, tail), load_tail(df, r + i, tail)), r + i, tail);
      const VF v = load_tail(df, r + i, tail);
      s0 = hn::MulAdd(v, v, s0);
    }
    x = r;
  } else {
    for (; i + 2 * n <= body; i += 2 * n) {
      const VF a = load(df, x + i), b = load(df, x + i + n);
      s0 = hn::MulAdd(a, a, s0);
      s1 = hn::MulAdd(b, b, s1);
    }
    for (; i < body; i += n) {
      const VF a = load(df, x + i);
      s0 = hn::MulAdd(a, a, s0);
    }
    if (tail > 0) {
      const VF a = load_tail(df, x + i, tail);
      s1 = hn::MulAdd(a, a, s1);
    }
  }
  const float scale = 1.0F / std::sqrt(sum(df, hn::Add(s0, s1)) / static_cast<float>(d) + j.eps);
  const VF vs = hn::Set(df, scale);
  const bool hf = j.hf;
  for (i = 0; i < body; i += n) {
    VF v = hn::Mul(load(df, x + i), vs);
    if (hf) v = round_bf16(df, v);
    store(df, hn::Mul(v, load(df, w + i)), y + i);
  }
  if (tail > 0) {
    VF v = hn::Mul(load_tail(df, x + i, tail), vs);
    if (hf) v = round_bf16(df, v);
    store_tail(df, hn::Mul(v, load_tail(df, w + i, tail)), y + i, tail);
  }
}

template <class X, class W, class Y>
void norm_rows(const Job& j) {
  const auto row = [&](int64_t t) {
    norm_row(j, static_cast<const X*>(j.x) + t * j.x_stride,
             j.r == nullptr ? nullptr : static_cast<X*>(j.r) + t * j.d, static_cast<const W*>(j.w),
             static_cast<Y*>(j.y) + t * j.y_stride);
  };
  // Two passes over x and one over y.
  const int threads = team_for(
      static_cast<double>(j.T) * static_cast<double>(j.d) * (2.0 * sizeof(X) + sizeof(Y)), 0);
  for_rows(j.T, threads, row);
}

void rmsnorm(const Job& j) {
  const int key = j.x_type | j.w_type << 1 | j.y_type << 2;
  switch (key) {
    case 0:
      return norm_rows<float, float, float>(j);
    case 1:
      return norm_rows<uint16_t, float, float>(j);
    case 2:
      return norm_rows<float, uint16_t, float>(j);
    case 3:
      return norm_rows<uint16_t, uint16_t, float>(j);
    case 4:
      return norm_rows<float, float, uint16_t>(j);
    case 5:
      return norm_rows<uint16_t, float, uint16_t>(j);
    case 6:
      return norm_rows<float, uint16_t, uint16_t>(j);
    default:
      return norm_rows<uint16_t, uint16_t, uint16_t>(j);
  }
}
const char* rmsnorm_target() { return hwy::TargetName(HWY_TARGET); }

}  // namespace
}  // namespace v3b::kern::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace v3b::kern {
namespace {
HWY_EXPORT(rmsnorm);
HWY_EXPORT(rmsnorm_target);
int code(spec::DType t) { return t == spec::DType::bf16 ? 1 : 0; }
}  // namespace

void rmsnorm_cpu_simd(const spec::RmsNormArgs& a) noexcept {
  const int c = code(a.dtype);
  const bool hf = a.norm_rounding == spec::NormRounding::hf && c == 1;  // f32 storage: no rounding
  const Job j{a.T, a.d, static_cast<float>(a.eps), hf, c, c, c, a.x, a.d, a.residual, a.w,
              a.y, a.d};
  HWY_DYNAMIC_DISPATCH(rmsnorm)(j);
}
void rmsnorm_mixed(const RmsNormMixedArgs& a) noexcept {
  const Job j{a.T,
              a.d,
              static_cast<float>(a.eps),
              a.norm_rounding == spec::NormRounding::hf,
              code(a.x_type),
              code(a.w_type),
              code(a.y_type),
              a.x,
              a.x_stride,
              nullptr,
              a.w,
              a.y,
              a.y_stride};
  HWY_DYNAMIC_DISPATCH(rmsnorm)(j);
}
const char* rmsnorm_cpu_simd_isa() noexcept { return HWY_DYNAMIC_DISPATCH(rmsnorm_target)(); }
}  // namespace v3b::kern
#endif
