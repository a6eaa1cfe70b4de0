// Element-wise parts of the experts: SwiGLU into rows or packed lanes, weighted sums. Of a product
// with K = 7168 they are below 1%, of the trained model's (256) about a tenth.
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/moe/moe_rows.cpu_simd.cpp"
#include "hwy/foreach_target.h"  // IWYU pragma: keep
//
#include <cstring>

#include "hwy/contrib/math/math-inl.h"
#include "hwy/highway.h"
#include "kernels/moe/moe_rows.h"
#include "kernels/norm_rope/hwy_io-inl.h"

HWY_BEFORE_NAMESPACE();
namespace v3b::kern::HWY_NAMESPACE {
namespace {

HWY_INLINE VF silu_mul(DF df, VF a, VF u) {
  // exp(-a) is capped: a very negative a gives -0 or a denormal, never a / inf * u = NaN.
  const VF e = hn::Exp(df, hn::Min(hn::Neg(a), hn::Set(df, 88.0F)));
  return hn::Mul(hn::Div(a, hn::Add(hn::Set(df, 1.0F), e)), u);
}

// out[i] = silu(gate[i]) * up[i], i < n. round: to bf16 although out is f32.
template <class Y>
void swiglu_row(const float* gate, const float* up, int64_t n, bool round, Y* out) {
  const DF df;
  const int64_t lanes = static_cast<int64_t>(hn::Lanes(df));
  int64_t i = 0;
  for (; i + lanes <= n; i += lanes) {
    const VF h = silu_mul(df, hn::LoadU(df, gate + i), hn::LoadU(df, up + i));
    store(df, round ? round_bf16(df, h) : h, out + i);
  }
  if (i == n) return;
  const size_t tail = static_cast<size_t>(n - i);
  const VF h = silu_mul(df, load_tail(df, gate + i, tail), load_tail(df, up + i, tail));
  store_tail(df, round ? round_bf16(df, h) : h, out + i, tail);
}
void swiglu_to(const float* gate, const float* up, int64_t n, bool to_bf16, bool round, void* out) {
  if (to_bf16) return swiglu_row(gate, up, n, false, static_cast<uint16_t*>(out));
  swiglu_row(gate, up, n, round, static_cast<float*>(out));
}

// 16 lanes of one hidden unit, from `left` on zero.
void swiglu_16(const float* gate, const float* up, int64_t left, float* out) {
  const DF df;
  const int64_t n = static_cast<int64_t>(hn::Lanes(df));
  for (int64_t i = 0; i < 16; i += n) {
    VF h = silu_mul(df, hn::LoadU(df, gate + i), hn::LoadU(df, up + i));
    if (left < i + n)
      h = hn::IfThenElseZero(hn::FirstN(df, static_cast<size_t>(left > i ? left - i : 0)), h);
    hn::Store(h, df, out + i);
  }
}
void swiglu_lanes(const float* gate, const float* up, int64_t ld, int64_t n, int64_t lanes,
                  bool pairs, bool round, uint32_t* out, int64_t group, int64_t steps) {
  const DF df;
  const hn::RebindToUnsigned<DF> du;
  const int64_t width = static_cast<int64_t>(hn::Lanes(df)), each = pairs ? 2 : 1;
  HWY_ALIGN float lo[16], hi[16];
  for (int64_t g = 0; g * 16 < lanes; ++g) {
    uint32_t* to = out + g * group;
    for (int64_t s = 0; s < steps; ++s, to += 16) {
      const int64_t at = s * each * ld + g * 16, left = lanes - g * 16;
      if (s * each >= n) {
        std::memset(to, 0, 64);
        continue;
      }
      swiglu_16(gate + at, up + at, left, lo);
      const bool two = pairs && s * each + 1 < n;
      if (two) swiglu_16(gate + at + ld, up + at + ld, left, hi);
      for (int64_t i = 0; i < 16; i += width) {
        const VF v = hn::Load(df, lo + i);
        auto bits = hn::BitCast(du, round && !pairs ? round_bf16(df, v) : v);
        if (pairs) bits = round_bf16_bits(df, v);
        if (two) bits = hn::Or(bits, hn::ShiftLeft<16>(round_bf16_bits(df, hn::Load(df, hi + i))));
        hn::StoreU(bits, du, to + i);
      }
    }
  }
}

void add_scaled(const float* o, float w, int64_t n, float* y) {
  const DF df;
  const int64_t lanes = static_cast<int64_t>(hn::Lanes(df));
  const VF vw = hn::Set(df, w);
  int64_t i = 0;
  for (; i + lanes <= n; i += lanes)
    hn::StoreU(hn::MulAdd(vw, hn::LoadU(df, o + i), hn::LoadU(df, y + i)), df, y + i);
  for (; i < n; ++i) y[i] += w * o[i];
}

// y = bf16(y + bf16(w * bf16(o))), all in fp32 containers: moe_accum=bf16.
void add_scaled_bf16(const float* o, float w, int64_t n, float* y) {
  const DF df;
  const int64_t lanes = static_cast<int64_t>(hn::Lanes(df));
  const VF vw = hn::Set(df, w);
  const auto next = [&](VF vo, VF vy) {
    return round_bf16(df, hn::Add(vy, round_bf16(df, hn::Mul(vw, round_bf16(df, vo)))));
  };
  int64_t i = 0;
  for (; i + lanes <= n; i += lanes)
    hn::StoreU(next(hn::LoadU(df, o + i), hn::LoadU(df, y + i)), df, y + i);
  if (i == n) return;
  const size_t tail = static_cast<size_t>(n - i);
  store_tail(df, next(load_tail(df, o + i, tail), load_tail(df, y + i, tail)), y + i, tail);
}
void add_row(bool bf16, const float* o, float w, int64_t n, float* y) {
  if (bf16) return add_scaled_bf16(o, w, n, y);
  add_scaled(o, w, n, y);
}

void put_row(const float* y, int64_t n, bool to_bf16, void* out) {
  if (!to_bf16) {
    std::memcpy(out, y, static_cast<size_t>(n) * 4);
    return;
  }
  const DF df;
  const int64_t lanes = static_cast<int64_t>(hn::Lanes(df));
  auto* o = static_cast<uint16_t*>(out);
  int64_t i = 0;
  for (; i + lanes <= n; i += lanes) store(df, hn::LoadU(df, y + i), o + i);
  if (i < n)
    store_tail(df, load_tail(df, y + i, static_cast<size_t>(n - i)), o + i,
               static_cast<size_t>(n - i));
}

const char* moe_target() { return hwy::TargetName(HWY_TARGET); }

}  // namespace
}  // namespace v3b::kern::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace v3b::kern {
namespace {
HWY_EXPORT(swiglu_to);
HWY_EXPORT(swiglu_lanes);
HWY_EXPORT(add_row);
HWY_EXPORT(put_row);
HWY_EXPORT(moe_target);
}  // namespace

void moe_swiglu_row(const float* gate, const float* up, int64_t n, bool to_bf16, bool round,
                    void* out) noexcept {
  HWY_DYNAMIC_DISPATCH(swiglu_to)(gate, up, n, to_bf16, round, out);
}
void moe_swiglu_lanes(const float* gate, const float* up, int64_t ld, int64_t n, int64_t lanes,
                      bool pairs, bool round, uint32_t* out, int64_t group,
                      int64_t steps) noexcept {
  HWY_DYNAMIC_DISPATCH(swiglu_lanes)(gate, up, ld, n, lanes, pairs, round, out, group, steps);
}
void moe_add_row(bool bf16, const float* o, float w, int64_t n, float* y) noexcept {
  HWY_DYNAMIC_DISPATCH(add_row)(bf16, o, w, n, y);
}
void moe_put_row(const float* y, int64_t n, bool to_bf16, void* out) noexcept {
  HWY_DYNAMIC_DISPATCH(put_row)(y, n, to_bf16, out);
}
const char* moe_rows_isa() noexcept { return HWY_DYNAMIC_DISPATCH(moe_target)(); }

}  // namespace v3b::kern
#endif  // HWY_ONCE
