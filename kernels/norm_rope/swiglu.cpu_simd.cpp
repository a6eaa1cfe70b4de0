// SwiGLU: silu(a) = a / (1 + exp(-a)). Bandwidth-bound, closely: about 25 instructions for 16 elements of 6 bytes
// (kernels/notes/elementwise.md), so bf16 takes a shorter polynomial and a reciprocal instead of the division.
#define HWY_DISABLED_TARGETS HWY_SSE4  // the build needs AVX2 anyway: less to compile
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/norm_rope/swiglu.cpu_simd.cpp"
#include "hwy/foreach_target.h"  // IWYU pragma: keep
//
#include <algorithm>
#include <cstring>

#include "hwy/highway.h"
#include "kernels/core/team.h"
#include "kernels/gemm/fp8.h"
#include "kernels/norm_rope/exp-inl.h"
#include "kernels/norm_rope/hwy_io-inl.h"
#include "kernels/norm_rope/pairs-inl.h"
#include "kernels/norm_rope/stream.h"
#include "kernels/norm_rope/swiglu.h"

#ifndef V3B_SWIGLU_ONCE
#define V3B_SWIGLU_ONCE
namespace v3b::kern {
namespace {
constexpr double kExpBytes = 16;      // an exponential costs about as much as moving so many bytes
constexpr int64_t kQuantPart = 1024;  // elements of y that are quantised at once, out of L1
}  // namespace
}  // namespace v3b::kern
#endif

HWY_BEFORE_NAMESPACE();
namespace v3b::kern::HWY_NAMESPACE {
namespace {

// silu(a) u. The argument of exp is capped so that a very negative a gives -0 or a tiny number, not a / inf * u = NaN for
// u = inf. kFine: for f32 (about 4e-7); else 7e-5 (2e-5 on AVX2), small beside bf16's 4e-3.
template <bool kFine>
HWY_INLINE VF gated(VF a, VF u) {
  const DF df;
  const VF one = hn::Set(df, 1.0F);
  if constexpr (kFine) {
    const VF e = exp_between(at_least(kExpLeast, at_most(86.0F, hn::Neg(a))));
    return hn::Mul(hn::Div(a, hn::Add(one, e)), u);
  }
  const VF d = one_plus_exp_of_minus(at_least(-86.0F, at_most(87.0F, a)));
  VF q = hn::ApproximateReciprocal(d);  // 14 bits; 12 on AVX2, doubled
  if constexpr (HWY_TARGET > HWY_AVX3) q = hn::MulAdd(hn::NegMulAdd(d, q, one), q, q);
  return hn::Mul(hn::Mul(a, q), u);
}

template <class X, class Y>
void swiglu_row(int64_t m, const X* g, const X* u, float scale, Y* y) {
  const DF df;
  const int64_t n = static_cast<int64_t>(hn::Lanes(df));
  const VF vs = hn::Set(df, scale);
  int64_t i = 0;
  for (; i + n <= m; i += n)
    store(df, hn::Mul(gated<sizeof(Y) == 4>(load(df, g + i), load(df, u + i)), vs), y + i);
  if (i < m) {
    const size_t tail = static_cast<size_t>(m - i);
    const VF v = gated<sizeof(Y) == 4>(load_tail(df, g + i, tail), load_tail(df, u + i, tail));
    store_tail(df, hn::Mul(v, vs), y + i, tail);
  }
}

// One type: whole cache lines of the output at a time. The rows of gate and up are short streams (4 KiB in V3's
// experts): what is asked for ahead goes on in the next row, `stride` elements on.
template <class E, bool kScaled, bool kStream, bool kNative>
void same_type_row(int64_t m, int64_t stride, const E* g, const E* u, float scale, E* y) {
  const DF df;
  constexpr bool kFine = sizeof(E) == 4;
  constexpr int64_t kAhead = 1024 / sizeof(E);
  const int64_t n = 2 * static_cast<int64_t>(hn::Lanes(df)), body = m / n * n;
  const VF vs = hn::Set(df, scale);
  for (int64_t i = 0; i < body; i += n) {
    const int64_t next = i + kAhead < body ? i + kAhead : i + kAhead - body + stride;
    lines_ahead(g + next, 0), lines_ahead(u + next, 0);
    const Two a = load_two(g + i), b = load_two(u + i);
    Two v = {gated<kFine>(a.a, b.a), gated<kFine>(a.b, b.b)};
    if constexpr (kScaled) v = {hn::Mul(v.a, vs), hn::Mul(v.b, vs)};
    put<kStream>(round_two<E, kNative>(v.a, v.b), y + i);
  }
  if (body < m) swiglu_row(m - body, g + body, u + body, scale, y + body);
}
template <class E, bool kStream, bool kNative>
void same_type_rows(const spec::SwigluArgs& a, int threads) {
  for_spans(a.T, threads, [&](int64_t lo, int64_t hi) {
    for (int64_t t = lo; t < hi; ++t) {
      const E* g = static_cast<const E*>(a.gate) + t * a.in_stride;
      const E* u = static_cast<const E*>(a.up) + t * a.in_stride;
      E* y = static_cast<E*>(a.y) + t * a.y_stride;
      if (a.row_scale != nullptr)
        same_type_row<E, true, kStream, kNative>(a.m, a.in_stride, g, u, a.row_scale[t], y);
      else
        same_type_row<E, false, kStream, kNative>(a.m, a.in_stride, g, u, 1.0F, y);
    }
    if (kStream) hwy::FlushStream();
  });
}
template <class E>
void same_type(const spec::SwigluArgs& a, int threads) {
  const int64_t e = sizeof(E);
  const bool stream = stream_output(a.T * a.m * e) && line_aligned(a.y, a.y_stride * e);
  if (native_bf16<E>())
    return stream ? same_type_rows<E, true, true>(a, threads)
                  : same_type_rows<E, false, true>(a, threads);
  stream ? same_type_rows<E, true, false>(a, threads) : same_type_rows<E, false, false>(a, threads);
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
  if constexpr (sizeof(X) == sizeof(Y)) return same_type<X>(a, threads);
  for_rows(a.T, threads, row);
}

void swiglu(const spec::SwigluArgs& a) {
  const bool xb = a.in_type == spec::DType::bf16, yb = a.out_type == spec::DType::bf16;
  if (xb && yb) return swiglu_rows<uint16_t, uint16_t>(a);
  if (xb) return swiglu_rows<uint16_t, float>(a);
  if (yb) return swiglu_rows<float, uint16_t>(a);
  swiglu_rows<float, float>(a);
}

// Parts of a row of y in L1, quantised from there.
template <class X, bool kScaled, bool kNative>
void quantised_rows(const spec::SwigluArgs& a, const QuantOut& q, int64_t lo, int64_t hi,
                    bool stream) {
  alignas(64) uint16_t part[kQuantPart];
  const Fp8Values how = fp8_values(q.act_scale, stream);
  for (int64_t t = lo; t < hi; ++t) {
    const X* g = static_cast<const X*>(a.gate) + t * a.in_stride;
    const X* u = static_cast<const X*>(a.up) + t * a.in_stride;
    const float scale = kScaled ? a.row_scale[t] : 1.0F;
    for (int64_t at = 0; at < a.m; at += kQuantPart) {
      const int64_t n = std::min(kQuantPart, a.m - at);
      // What is asked for ahead goes on behind this part, or in the next row.
      const int64_t next = at + n < a.m ? n : a.in_stride - at;
      if constexpr (sizeof(X) == 2)
        same_type_row<X, kScaled, false, kNative>(n, next, g + at, u + at, scale, part);
      else
        swiglu_row(n, g + at, u + at, scale, part);
      fp8_quant_values(how, part, n, q.codes + t * a.m + at,
                       q.scales + t * spec::fp8_blocks(a.m) + at / spec::kFp8Block);
      if (a.y != nullptr)
        std::memcpy(static_cast<uint16_t*>(a.y) + t * a.y_stride + at, part,
                    static_cast<size_t>(n) * 2);
    }
  }
  if (stream) hwy::FlushStream();
}
template <class X>
void quantised(const spec::SwigluArgs& a, const QuantOut& q) {
  const int threads = team_for(static_cast<double>(a.T) * static_cast<double>(a.m) * kExpBytes, 0);
  const bool stream = stream_output(a.T * a.m);
  for_spans(a.T, threads, [&](int64_t lo, int64_t hi) {
    const bool scaled = a.row_scale != nullptr;
    if (native_bf16<uint16_t>())
      scaled ? quantised_rows<X, true, true>(a, q, lo, hi, stream)
             : quantised_rows<X, false, true>(a, q, lo, hi, stream);
    else
      scaled ? quantised_rows<X, true, false>(a, q, lo, hi, stream)
             : quantised_rows<X, false, false>(a, q, lo, hi, stream);
  });
}
void swiglu_quant(const spec::SwigluArgs& a, const QuantOut& q) {
  a.in_type == spec::DType::bf16 ? quantised<uint16_t>(a, q) : quantised<float>(a, q);
}

const char* swiglu_target() { return target_name<uint16_t>(); }

}  // namespace
}  // namespace v3b::kern::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace v3b::kern {
namespace {
HWY_EXPORT(swiglu);
HWY_EXPORT(swiglu_quant);
HWY_EXPORT(swiglu_target);
}  // namespace
void swiglu_cpu_simd(const spec::SwigluArgs& a) noexcept { HWY_DYNAMIC_DISPATCH(swiglu)(a); }
void swiglu_quant_cpu_simd(const spec::SwigluArgs& a, const QuantOut& q) noexcept {
  HWY_DYNAMIC_DISPATCH(swiglu_quant)(a, q);
}
const char* swiglu_cpu_simd_isa() noexcept { return HWY_DYNAMIC_DISPATCH(swiglu_target)(); }
}  // namespace v3b::kern
#endif
