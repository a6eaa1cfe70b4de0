// RoPE: interleaved pairs are loaded as two deinterleaved vectors, half-split pairs as two plain
// ones; cos and sin come from the f32 tables. Arithmetic in f32, one rounding. Bandwidth-bound.
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/norm_rope/rope.cpu_simd.cpp"
#include "hwy/foreach_target.h"  // IWYU pragma: keep
//

#include "hwy/highway.h"
#include "kernels/core/team.h"
#include "kernels/norm_rope/hwy_io-inl.h"
#include "kernels/norm_rope/rope.h"

#ifndef V3B_ROPE_ONCE
#define V3B_ROPE_ONCE
namespace v3b::kern {
namespace {
constexpr int64_t kMaxDr = 512;  // wider slices take several rounds of pairs
}  // namespace
}  // namespace v3b::kern
#endif

HWY_BEFORE_NAMESPACE();
namespace v3b::kern::HWY_NAMESPACE {
namespace {

// One slice through two f32 arrays of first and second elements: a[half], b[half]. The pair loop is
// what vectorises; (de)interleaving small slices is left to the compiler.
template <class X, class Y>
void rotate_slice(const spec::RopeArgs& r, const X* x, Y* y, const float* c, const float* s,
                  float* a, float* b) {
  const DF df;
  const int64_t half = r.d_r / 2, n = static_cast<int64_t>(hn::Lanes(df));
  const bool in_pairs = r.form == spec::RopeForm::interleaved ||
                        (r.form == spec::RopeForm::interleaved_to_half && !r.inverse);
  const bool out_pairs = r.form == spec::RopeForm::interleaved ||
                         (r.form == spec::RopeForm::interleaved_to_half && r.inverse);
  const auto value = [](X v) {
    if constexpr (sizeof(X) == 2)
      return spec::to_float(spec::bf16{v});
    else
      return v;
  };
  const auto back = [](float v) -> Y {
    if constexpr (sizeof(Y) == 2)
      return spec::to_bf16(v).bits;
    else
      return v;
  };
  if (in_pairs) {
    for (int64_t i = 0; i < half; ++i) a[i] = value(x[2 * i]), b[i] = value(x[2 * i + 1]);
  } else {
    for (int64_t i = 0; i < half; ++i) a[i] = value(x[i]), b[i] = value(x[half + i]);
  }
  const VF sign = hn::Set(df, r.inverse ? -1.0F : 1.0F);
  int64_t i = 0;
  for (; i + n <= half; i += n) {
    const VF vc = hn::LoadU(df, c + i), vs = hn::Mul(sign, hn::LoadU(df, s + i));
    const VF va = hn::LoadU(df, a + i), vb = hn::LoadU(df, b + i);
    hn::StoreU(hn::NegMulAdd(vb, vs, hn::Mul(va, vc)), df, a + i);
    hn::StoreU(hn::MulAdd(va, vs, hn::Mul(vb, vc)), df, b + i);
  }
  for (; i < half; ++i) {
    const float sn = r.inverse ? -s[i] : s[i], va = a[i], vb = b[i];
    a[i] = va * c[i] - vb * sn;
    b[i] = va * sn + vb * c[i];
  }
  if (out_pairs) {
    for (i = 0; i < half; ++i) y[2 * i] = back(a[i]), y[2 * i + 1] = back(b[i]);
  } else {
    for (i = 0; i < half; ++i) y[i] = back(a[i]), y[half + i] = back(b[i]);
  }
}

template <class X, class Y>
void rope_tokens(const spec::RopeArgs& r) {
  const int64_t half = r.d_r / 2;
  const auto token = [&](int64_t t, float* a, float* b) {
    const int64_t p = r.positions == nullptr ? t : r.positions[t];
    for (int64_t h = 0; h < r.n_h; ++h) {
      rotate_slice(r, static_cast<const X*>(r.x) + t * r.x_token_stride + h * r.x_head_stride,
                   static_cast<Y*>(r.y) + t * r.y_token_stride + h * r.y_head_stride,
                   r.cos + p * half, r.sin + p * half, a, b);
    }
  };
  // Short slices with shuffles: four times the bytes' cost.
  const int threads = team_for(
      4.0 * static_cast<double>(r.T * r.n_h) * static_cast<double>(r.d_r) * (sizeof(X) + sizeof(Y)),
      0);
  if (r.T == 1 || threads == 1) {
    HWY_ALIGN float a[kMaxDr / 2], b[kMaxDr / 2];
    for (int64_t t = 0; t < r.T; ++t) token(t, a, b);
    return;
  }
#pragma omp parallel num_threads(threads)
  {
    HWY_ALIGN float a[kMaxDr / 2], b[kMaxDr / 2];
#pragma omp for schedule(static)
    for (int64_t t = 0; t < r.T; ++t) token(t, a, b);
  }
}

void rope(const spec::RopeArgs& r) {
  const bool xb = r.x_type == spec::DType::bf16, yb = r.y_type == spec::DType::bf16;
  if (xb && yb) return rope_tokens<uint16_t, uint16_t>(r);
  if (xb) return rope_tokens<uint16_t, float>(r);
  if (yb) return rope_tokens<float, uint16_t>(r);
  rope_tokens<float, float>(r);
}
const char* rope_target() { return hwy::TargetName(HWY_TARGET); }

}  // namespace
}  // namespace v3b::kern::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace v3b::kern {
namespace {
HWY_EXPORT(rope);
HWY_EXPORT(rope_target);
}  // namespace
void rope_cpu_simd(const spec::RopeArgs& a) noexcept { HWY_DYNAMIC_DISPATCH(rope)(a); }
const char* rope_cpu_simd_isa() noexcept { return HWY_DYNAMIC_DISPATCH(rope_target)(); }
}  // namespace v3b::kern
#endif
