// 128 values over a scale to E4M3 codes, the same bits as dividing each and spec::to_f8e4m3, with about half of the
// instructions (kernels/notes/elementwise.md):
// - the quotient from the reciprocal and one correction, q = x r, q += (x - q s) r: correctly rounded where r is;
// - rounding at bit 20 on 32-bit lanes, then two vectors become one of 16-bit lanes, where exponent and mantissa move
//   down to the code's place. That is right from 2^-6 on and at 0; a block with a value between 2^-10 and 2^-6 (a few in a
//   hundred) says so, and the caller takes the long way.
// Per-target header: included again for every target, no include guard in the usual sense.
#if defined(V3B_KERNELS_GEMM_FP8_ENCODE_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef V3B_KERNELS_GEMM_FP8_ENCODE_INL_H_
#undef V3B_KERNELS_GEMM_FP8_ENCODE_INL_H_
#else
#define V3B_KERNELS_GEMM_FP8_ENCODE_INL_H_
#endif

#include <hwy/highway.h>

#include <bit>

#include "reference/spec/dtype.h"

HWY_BEFORE_NAMESPACE();
namespace v3b::kern::HWY_NAMESPACE {
namespace {
namespace fp8 {
namespace hn = hwy::HWY_NAMESPACE;
using Df = hn::ScalableTag<float>;
using Du = hn::RebindToUnsigned<Df>;
using D16 = hn::Repartition<uint16_t, Df>;
constexpr int64_t kRow = 128;

// The even and odd elements of bf16, or the two halves of f32, of 2 * Lanes values.
HWY_INLINE void load_two(const spec::bf16* p, hn::Vec<Df>& a, hn::Vec<Df>& b) {
  const Du du;
  const auto u = hn::LoadU(du, reinterpret_cast<const uint32_t*>(p));
  a = hn::BitCast(Df(), hn::ShiftLeft<16>(u));
  b = hn::BitCast(Df(), hn::And(u, hn::Set(du, 0xffff0000u)));
}
HWY_INLINE void load_two(const float* p, hn::Vec<Df>& a, hn::Vec<Df>& b) {
  a = hn::LoadU(Df(), p);
  b = hn::LoadU(Df(), p + hn::Lanes(Df()));
}
// The upper halves of both, in the order of memory.
HWY_INLINE hn::Vec<D16> upper(const spec::bf16*, hn::Vec<Du> a, hn::Vec<Du> b) {
  return hn::OddEven(hn::BitCast(D16(), b), hn::BitCast(D16(), hn::ShiftRight<16>(a)));
}
HWY_INLINE hn::Vec<D16> upper(const float*, hn::Vec<Du> a, hn::Vec<Du> b) {
  const hn::RebindToSigned<Df> di;
  const hn::Rebind<uint16_t, Df> half;
  return hn::Combine(D16(), hn::DemoteTo(half, hn::BitCast(di, hn::ShiftRight<16>(b))),
                     hn::DemoteTo(half, hn::BitCast(di, hn::ShiftRight<16>(a))));
}

// Bits of the largest magnitude of `rows` rows of 128: NaN and infinity show as 0x7f800000 and above.
HWY_INLINE uint32_t top_bits(const spec::bf16* x, int64_t rows, int64_t stride) {
  const Du du;
  const D16 d16;
  const int64_t n = static_cast<int64_t>(hn::Lanes(d16));
  const auto magnitude = hn::Set(d16, uint16_t{0x7fff});
  auto m0 = hn::Zero(d16), m1 = m0;
  for (int64_t r = 0; r < rows; ++r, x += stride)
    for (int64_t i = 0; i < kRow; i += 2 * n) {
      const uint16_t* p = reinterpret_cast<const uint16_t*>(x + i);
      m0 = hn::Max(m0, hn::And(hn::LoadU(d16, p), magnitude));
      m1 = hn::Max(m1, hn::And(hn::LoadU(d16, p + n), magnitude));
    }
  const auto w = hn::BitCast(du, hn::Max(m0, m1));
  return hn::GetLane(
      hn::MaxOfLanes(du, hn::Max(hn::ShiftLeft<16>(w), hn::And(w, hn::Set(du, 0xffff0000u)))));
}
HWY_INLINE uint32_t top_bits(const float* x, int64_t rows, int64_t stride) {
  const Du du;
  const int64_t n = static_cast<int64_t>(hn::Lanes(du));
  const auto magnitude = hn::Set(du, 0x7fffffffu);
  auto m0 = hn::Zero(du), m1 = m0;
  for (int64_t r = 0; r < rows; ++r, x += stride)
    for (int64_t i = 0; i < kRow; i += 2 * n) {
      const uint32_t* p = reinterpret_cast<const uint32_t*>(x + i);
      m0 = hn::Max(m0, hn::And(hn::LoadU(du, p), magnitude));
      m1 = hn::Max(m1, hn::And(hn::LoadU(du, p + n), magnitude));
    }
  return hn::GetLane(hn::MaxOfLanes(du, hn::Max(m0, m1)));
}

// Where the reciprocal and the correction are safe from overflow and underflow.
HWY_INLINE bool plain_scale(float s) { return s >= 0x1p-80F && s <= 0x1p100F; }

// Codes of x[128] / scale, |x / scale| <= 448 and plain_scale(); false: some are wrong. kPower: scale is a power of two.
template <bool kPower, bool kStream, class T>
HWY_INLINE bool encode_row(const T* x, float scale, uint8_t* codes) {
  const Df df;
  const Du du;
  const D16 d16;
  const hn::RebindToSigned<D16> di16;
  const hn::Rebind<uint8_t, D16> d8;
  const int64_t n = static_cast<int64_t>(hn::Lanes(d16));
  const auto vs = hn::Set(df, scale), vr = hn::Set(df, 1.0F / scale);
  const auto rounded = [&](hn::Vec<Df> v) {
    auto q = hn::Mul(v, vr);
    if constexpr (!kPower) q = hn::MulAdd(hn::NegMulAdd(q, vs, v), vr, q);
    const auto u = hn::BitCast(du, q);
    return hn::Add(u,
                   hn::Add(hn::And(hn::ShiftRight<20>(u), hn::Set(du, 1u)), hn::Set(du, 0x7ffffu)));
  };
  constexpr uint16_t kSmallest = 117 << 3, kNormal = 121 << 3;  // 2^-10, 2^-6: exponent and 3 bits
  auto nearest = hn::Set(d16, uint16_t{0xffff});
  for (int64_t i = 0; i < kRow; i += n) {
    hn::Vec<Df> a, b;
    load_two(x + i, a, b);
    const auto h = upper(x, rounded(a), rounded(b));
    const auto v = hn::ShiftRight<4>(hn::And(h, hn::Set(d16, uint16_t{0x7fff})));
    nearest = hn::Min(nearest, hn::Sub(v, hn::Set(d16, kSmallest)));
    const auto sign = hn::And(hn::ShiftRight<8>(h), hn::Set(d16, uint16_t{0x80}));
    const auto code = hn::Or(hn::SaturatedSub(v, hn::Set(d16, uint16_t{120 << 3})), sign);
    const auto bytes = hn::DemoteTo(d8, hn::BitCast(di16, code));
    if constexpr (kStream)
      hn::Stream(bytes, d8, codes + i);
    else
      hn::StoreU(bytes, d8, codes + i);
  }
  const auto least = hn::Set(d16, uint16_t{kNormal - kSmallest});
  return hn::AllTrue(d16, hn::Eq(hn::Max(nearest, least), nearest));
}

}  // namespace fp8
}  // namespace
}  // namespace v3b::kern::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();
#endif
