// RMSNorm in two passes over a row: sum of squares in f32 lanes, then scale. Bandwidth-bound for T rows, latency-bound
// for one. Row and weight lie in L1 between the passes; so that the memory does not idle during the second, which only
// writes, that pass asks for the next row into L2 (kernels/notes/elementwise.md).
#define HWY_DISABLED_TARGETS HWY_SSE4  // the build needs AVX2 anyway: less to compile
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/norm_rope/rmsnorm.cpu_simd.cpp"
#include "hwy/foreach_target.h"  // IWYU pragma: keep
//
#include <algorithm>
#include <cmath>
#include <cstring>

#include "hwy/highway.h"
#include "kernels/core/buffer.h"
#include "kernels/core/team.h"
#include "kernels/gemm/fp8.h"
#include "kernels/norm_rope/hwy_io-inl.h"
#include "kernels/norm_rope/pairs-inl.h"
#include "kernels/norm_rope/rmsnorm.h"
#include "kernels/norm_rope/stream.h"

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
  const void*
      r_in;  // residual as it comes and goes, in the dtype of x, dense rows, may be one; or both null
  void* r;
  const void* w;
  void* y;
  int64_t y_stride;
  const QuantOut* quant;  // or null; bf16 rows only, then y may be null
};
constexpr int64_t kQuantPart = 1024;  // elements of y that are quantised at once, out of L1
}  // namespace
}  // namespace v3b::kern
#endif

HWY_BEFORE_NAMESPACE();
namespace v3b::kern::HWY_NAMESPACE {
namespace {

template <class X, class W, class Y>
void norm_row(const Job& j, const X* x, const W* w, Y* y) {
  const DF df;
  const int64_t n = static_cast<int64_t>(hn::Lanes(df)), d = j.d, body = d / n * n;
  const size_t tail = static_cast<size_t>(d - body);
  VF s0 = hn::Zero(df), s1 = hn::Zero(df);
  int64_t i = 0;
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
    norm_row(j, static_cast<const X*>(j.x) + t * j.x_stride, static_cast<const W*>(j.w),
             static_cast<Y*>(j.y) + t * j.y_stride);
  };
  // Two passes over x and one over y.
  const int threads = team_for(
      static_cast<double>(j.T) * static_cast<double>(j.d) * (2.0 * sizeof(X) + sizeof(Y)), 0);
  for_rows(j.T, threads, row);
}

// Rows of one type.
template <class E, bool kResidual, bool kStream, bool kNative>
struct Rows {
  const Job& j;
  const E* w;
  E* kept;  // [d], residual only: the rounded sum, until the second pass

  const E* x(int64_t t) const { return static_cast<const E*>(j.x) + t * j.x_stride; }
  const E* r_in(int64_t t) const { return static_cast<const E*>(j.r_in) + t * j.d; }

  // First pass: the sum of squares, of the updated residual if there is one. Many sums: with few, the
  // latency of the additions is longer than the loads take.
  template <bool kMore>
  HWY_INLINE float sum_squares(int64_t t) const {
    const DF df;
    const int64_t n = 2 * static_cast<int64_t>(hn::Lanes(df)), d = j.d, body = d / n * n;
    const E* from = x(t);
    const auto line = [&](int64_t i, VF& s0, VF& s1) HWY_ATTR {
      Raw<E> v = raw(from + i);
      if constexpr (kResidual) {
        if constexpr (kMore) to_l2(x(t + 1) + i);
        const Two a = widen(v), before = load_two(r_in(t) + i);
        v = round_two<E, false>(hn::Add(a.a, before.a), hn::Add(a.b, before.b));
        put<false>(v, kept + i);
        put<kStream>(v, static_cast<E*>(j.r) + t * d + i);
      }
      add_squares<kNative>(v, s0, s1);
    };
    VF s0 = hn::Zero(df), s1 = s0, s2 = s0, s3 = s0, s4 = s0, s5 = s0, s6 = s0, s7 = s0;
    int64_t i = 0;
    if constexpr (sizeof(E) == 2 && kNative) {
      for (; i + 8 * n <= body; i += 8 * n) {
        line(i, s0, s0), line(i + n, s1, s1), line(i + 2 * n, s2, s2), line(i + 3 * n, s3, s3);
        line(i + 4 * n, s4, s4), line(i + 5 * n, s5, s5), line(i + 6 * n, s6, s6);
        line(i + 7 * n, s7, s7);
      }
    } else {
      for (; i + 2 * n <= body; i += 2 * n) line(i, s0, s1), line(i + n, s2, s3);
    }
    for (; i < body; i += n) line(i, s0, s1);
    s0 = hn::Add(hn::Add(s0, s4), hn::Add(s1, s5));
    s2 = hn::Add(hn::Add(s2, s6), hn::Add(s3, s7));
    float total = sum(df, hn::Add(s0, s2));
    for (i = body; i < d; ++i) {
      E v = from[i];
      if constexpr (kResidual) {
        v = element<E>(value(v) + value(r_in(t)[i]));
        static_cast<E*>(j.r)[t * d + i] = kept[i] = v;
      }
      total += value(v) * value(v);
    }
    return total;
  }

  // Second pass, of elements [lo, hi) of the row; y: where element 0 goes.
  template <bool kMore, bool kPast>
  HWY_INLINE void scale_part(int64_t t, float scale, int64_t lo, int64_t hi, E* y) const {
    const DF df;
    const int64_t n = 2 * static_cast<int64_t>(hn::Lanes(df)), body = lo + (hi - lo) / n * n;
    const E* from = kResidual ? kept : x(t);
    const VF vs = hn::Set(df, scale);
    const bool hf = j.hf;
    for (int64_t i = lo; i < body; i += n) {
      if constexpr (kMore) to_l2((kResidual ? r_in(t + 1) : x(t + 1)) + i);
      Two v = load_two(from + i);
      v = {hn::Mul(v.a, vs), hn::Mul(v.b, vs)};
      if (hf) v = {round_bf16(df, v.a), round_bf16(df, v.b)};
      const Two weight = load_two(w + i);
      put<kPast>(round_two<E, kNative>(hn::Mul(v.a, weight.a), hn::Mul(v.b, weight.b)), y + i);
    }
    for (int64_t i = body; i < hi; ++i) {
      float v = value(from[i]) * scale;
      if (hf) v = spec::to_float(spec::to_bf16(v));
      y[i] = element<E>(v * value(w[i]));
    }
  }

  template <bool kMore>
  HWY_INLINE void scale_row(int64_t t, float scale) const {
    E* y = static_cast<E*>(j.y) + t * j.y_stride;
    if constexpr (sizeof(E) == 2)
      if (j.quant != nullptr) return quantise_row<kMore>(t, scale, j.y == nullptr ? nullptr : y);
    scale_part<kMore, kStream>(t, scale, 0, j.d, y);
  }
  template <bool kMore>
  HWY_INLINE void quantise_row(int64_t t, float scale, E* y) const {
    alignas(64) E part[kQuantPart];
    const Fp8Values how = fp8_values(j.quant->act_scale, kStream);
    for (int64_t lo = 0; lo < j.d; lo += kQuantPart) {
      const int64_t hi = std::min(j.d, lo + kQuantPart);
      scale_part<kMore, false>(t, scale, lo, hi, part - lo);
      fp8_quant_values(how, part, hi - lo, j.quant->codes + t * j.d + lo,
                       j.quant->scales + t * spec::fp8_blocks(j.d) + lo / spec::kFp8Block);
      if (y != nullptr) std::memcpy(y + lo, part, static_cast<size_t>(hi - lo) * sizeof(E));
    }
  }

  // kMore: a row comes after this one; both passes ask for their share of it.
  template <bool kMore>
  void row(int64_t t) const {
    const float mean = sum_squares<kMore>(t) / static_cast<float>(j.d);
    scale_row<kMore>(t, 1.0F / std::sqrt(mean + j.eps));
  }
  void span(int64_t lo, int64_t hi) const {
    for (int64_t t = lo; t + 1 < hi; ++t) row<true>(t);
    row<false>(hi - 1);
    if (kStream) hwy::FlushStream();
  }
};

template <class E, bool kResidual, bool kStream, bool kNative>
void same_type_spans(const Job& j) {
  const double passes = kResidual ? 5.0 : 3.0;
  const int threads =
      team_for(passes * static_cast<double>(j.T) * static_cast<double>(j.d) * sizeof(E), 0);
  for_spans(j.T, threads, [&](int64_t lo, int64_t hi) {
    if constexpr (!kResidual)
      return Rows<E, false, kStream, kNative>{j, static_cast<const E*>(j.w), nullptr}.span(lo, hi);
    Buffer<E> kept(j.d, false);
    Rows<E, kResidual, kStream, kNative>{j, static_cast<const E*>(j.w), kept.data()}.span(lo, hi);
  });
}
template <class E, bool kStream, bool kNative>
void same_type_as(const Job& j) {
  j.r != nullptr ? same_type_spans<E, true, kStream, kNative>(j)
                 : same_type_spans<E, false, kStream, kNative>(j);
}
template <class E>
void same_type(const Job& j) {
  const int64_t e = sizeof(E);
  const bool stream = stream_output(j.T * j.d * e) && line_aligned(j.y, j.y_stride * e) &&
                      line_aligned(j.r, j.d * e);
  if (native_bf16<E>())
    return stream ? same_type_as<E, true, true>(j) : same_type_as<E, false, true>(j);
  stream ? same_type_as<E, true, false>(j) : same_type_as<E, false, false>(j);
}

void rmsnorm(const Job& j) {
  const int key = j.x_type | j.w_type << 1 | j.y_type << 2;
  switch (key) {
    case 0:
      return same_type<float>(j);
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
      return same_type<uint16_t>(j);
  }
}
const char* rmsnorm_target() { return target_name<uint16_t>(); }

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

void rmsnorm_cpu_simd(const spec::RmsNormArgs& a) noexcept { rmsnorm_cpu_simd(a, a.residual); }
void rmsnorm_cpu_simd(const spec::RmsNormArgs& a, const void* residual_in) noexcept {
  const int c = code(a.dtype);
  const bool hf = a.norm_rounding == spec::NormRounding::hf && c == 1;  // f32 storage: no rounding
  const Job j{a.T,         a.d,        static_cast<float>(a.eps),
              hf,          c,          c,
              c,           a.x,        a.d,
              residual_in, a.residual, a.w,
              a.y,         a.d,        nullptr};
  HWY_DYNAMIC_DISPATCH(rmsnorm)(j);
}
void rmsnorm_quant_cpu_simd(const spec::RmsNormArgs& a, const void* residual_in,
                            const QuantOut& q) noexcept {
  const bool hf = a.norm_rounding == spec::NormRounding::hf;
  const Job j{
      a.T, a.d, static_cast<float>(a.eps), hf, 1, 1, 1, a.x, a.d, residual_in, a.residual, a.w, a.y,
      a.d, &q};
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
              nullptr,
              a.w,
              a.y,
              a.y_stride,
              nullptr};
  HWY_DYNAMIC_DISPATCH(rmsnorm)(j);
}
const char* rmsnorm_cpu_simd_isa() noexcept { return HWY_DYNAMIC_DISPATCH(rmsnorm_target)(); }
}  // namespace v3b::kern
#endif
