// RoPE from f32 tables of cos and sin, arithmetic in f32, one rounding. Bandwidth-bound: slices of whole vectors go
// through registers (bf16 pairs are the halves of 32-bit words, so interleaved pairs need no shuffle) and out past the
// caches where they do not fit; other slices and mixed types through two small arrays.
#define HWY_DISABLED_TARGETS HWY_SSE4  // the build needs AVX2 anyway: less to compile
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/norm_rope/rope.cpu_simd.cpp"
#include "hwy/foreach_target.h"  // IWYU pragma: keep
//

#include "hwy/highway.h"
#include "kernels/core/team.h"
#include "kernels/norm_rope/hwy_io-inl.h"
#include "kernels/norm_rope/pairs-inl.h"
#include "kernels/norm_rope/rope.h"
#include "kernels/norm_rope/stream.h"

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

HWY_INLINE Two rotated(Two v, VF c, VF s) {
  return {hn::NegMulAdd(v.b, s, hn::Mul(v.a, c)), hn::MulAdd(v.a, s, hn::Mul(v.b, c))};
}

// Slices whose halves are whole vectors, one type, kIn and kOut: interleaved pairs, else
// half-split.
template <class E, bool kIn, bool kOut, bool kStream, bool kNative>
struct Slices {
  const spec::RopeArgs& r;

  // bf16: two vectors of pairs a turn, so that half-split outputs are written in whole lines.
  void slice(const uint16_t* x, uint16_t* y, const float* c, const float* s) const {
    const DF df;
    const int64_t half = r.d_r / 2, n = static_cast<int64_t>(hn::Lanes(df));
    for (int64_t i = 0; i < half; i += 2 * n) {
      Two v0, v1;
      if constexpr (kIn) {
        ahead(x + 2 * i), ahead(x + 2 * i + 2 * n);
        v0 = load_two(x + 2 * i), v1 = load_two(x + 2 * i + 2 * n);
      } else {
        ahead(x + i), ahead(x + half + i);
        v0 = {load(df, x + i), load(df, x + half + i)};
        v1 = {load(df, x + i + n), load(df, x + half + i + n)};
      }
      v0 = rotated(v0, hn::LoadU(df, c + i), hn::LoadU(df, s + i));
      v1 = rotated(v1, hn::LoadU(df, c + i + n), hn::LoadU(df, s + i + n));
      if constexpr (kOut) {
        put<kStream>(round_two<uint16_t, kNative>(v0.a, v0.b), y + 2 * i);
        put<kStream>(round_two<uint16_t, kNative>(v1.a, v1.b), y + 2 * i + 2 * n);
      } else {
        put<kStream>(round_in_order<kNative>(v0.a, v1.a), y + i);
        put<kStream>(round_in_order<kNative>(v0.b, v1.b), y + half + i);
      }
    }
  }
  // f32 pairs in place: y = x c + swapped(x) s with every cos twice and every sin as -s, s. Half-split: plain vectors.
  void slice(const float* x, float* y, const float* c, const float* s) const {
    const DF df;
    const int64_t half = r.d_r / 2, n = static_cast<int64_t>(hn::Lanes(df));
    if constexpr (kIn) {
      for (int64_t i = 0; i < 2 * half; i += n) {
        ahead(x + i);
        const VF v = hn::LoadU(df, x + i);
        const VF out =
            hn::MulAdd(hn::Shuffle2301(v), hn::LoadU(df, s + i), hn::Mul(v, hn::LoadU(df, c + i)));
        put_one(out, y + i);
      }
    } else {
      for (int64_t i = 0; i < half; i += n) {
        ahead(x + i), ahead(x + half + i);
        const Two v = rotated({hn::LoadU(df, x + i), hn::LoadU(df, x + half + i)},
                              hn::LoadU(df, c + i), hn::LoadU(df, s + i));
        put_one(v.a, y + i), put_one(v.b, y + half + i);
      }
    }
  }
  HWY_INLINE void put_one(VF v, float* p) const {
    if constexpr (kStream)
      hn::Stream(v, DF(), p);
    else
      hn::StoreU(v, DF(), p);
  }

  // A row of cos and sin in the order in which slice() wants it.
  void arrange(const float* c, const float* s, float* to_c, float* to_s) const {
    const int64_t half = r.d_r / 2;
    const float sign = r.inverse ? -1.0F : 1.0F;
    for (int64_t i = 0; i < half; ++i) {
      if constexpr (sizeof(E) == 4 && kIn) {
        to_c[2 * i] = to_c[2 * i + 1] = c[i];
        to_s[2 * i] = -sign * s[i], to_s[2 * i + 1] = sign * s[i];
      } else {
        to_c[i] = c[i], to_s[i] = sign * s[i];
      }
    }
  }
  void span(int64_t lo, int64_t hi) const {
    HWY_ALIGN float c[kMaxDr], s[kMaxDr];
    for (int64_t t = lo; t < hi; ++t) {
      const int64_t p = (r.positions == nullptr ? t : r.positions[t]) * (r.d_r / 2);
      arrange(r.cos + p, r.sin + p, c, s);
      const E* x = static_cast<const E*>(r.x) + t * r.x_token_stride;
      E* y = static_cast<E*>(r.y) + t * r.y_token_stride;
      for (int64_t h = 0; h < r.n_h; ++h)
        slice(x + h * r.x_head_stride, y + h * r.y_head_stride, c, s);
    }
    if (kStream) hwy::FlushStream();
  }
};

template <class E, bool kIn, bool kOut>
void fast_slices(const spec::RopeArgs& r, int threads, bool stream) {
  const auto run = [&](const auto& slices) {
    for_spans(r.T, threads, [&](int64_t lo, int64_t hi) { slices.span(lo, hi); });
  };
  if (native_bf16<E>())
    return stream ? run(Slices<E, kIn, kOut, true, true>{r})
                  : run(Slices<E, kIn, kOut, false, true>{r});
  stream ? run(Slices<E, kIn, kOut, true, false>{r}) : run(Slices<E, kIn, kOut, false, false>{r});
}

// Whether it did the work.
template <class E>
bool try_fast(const spec::RopeArgs& r, int threads) {
  const int64_t half = r.d_r / 2, e = sizeof(E), n = static_cast<int64_t>(hn::Lanes(DF()));
  const bool in_place = r.x == r.y;
  if (half % (e == 2 ? 2 * n : n) != 0 || r.d_r > kMaxDr) return false;
  const bool stream = !in_place && stream_output(r.T * r.n_h * r.d_r * e) &&
                      line_aligned(r.y, r.y_token_stride * e) &&
                      line_aligned(nullptr, r.y_head_stride * e) && line_aligned(nullptr, half * e);
  if (r.form == spec::RopeForm::interleaved) {
    fast_slices<E, true, true>(r, threads, stream);
    return true;
  }
  if (r.form == spec::RopeForm::half) {
    fast_slices<E, false, false>(r, threads, stream);
    return true;
  }
  if (in_place || e == 4) return false;  // elements move: a slice must be read before it is written
  if constexpr (sizeof(E) == 2)
    r.inverse ? fast_slices<E, false, true>(r, threads, stream)
              : fast_slices<E, true, false>(r, threads, stream);
  return true;
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
  // Short slices: twice the bytes' cost.
  const int threads = team_for(
      2.0 * static_cast<double>(r.T * r.n_h) * static_cast<double>(r.d_r) * (sizeof(X) + sizeof(Y)),
      0);
  if constexpr (sizeof(X) == sizeof(Y))
    if (try_fast<X>(r, threads)) return;
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
const char* rope_target() { return target_name<uint16_t>(); }

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
