// Rows of f32 or bf16 two vectors at a time, for the streaming kernels of this folder. bf16 comes as 32-bit words whose
// halves are an even and an odd element: one shift and one mask widen them, no shuffle, and a whole cache line is
// written at once (past the caches, if asked for). So the two vectors of bf16 hold even and odd elements, those of f32
// the first and second half; who combines operands takes all of one type.
// Per-target header: included again for every target, no include guard in the usual sense.
#if defined(V3B_KERNELS_NORM_ROPE_PAIRS_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef V3B_KERNELS_NORM_ROPE_PAIRS_INL_H_
#undef V3B_KERNELS_NORM_ROPE_PAIRS_INL_H_
#else
#define V3B_KERNELS_NORM_ROPE_PAIRS_INL_H_
#endif

#include "hwy/cache_control.h"
#include "hwy/highway.h"
#include "kernels/core/cpu.h"
#include "kernels/norm_rope/hwy_io-inl.h"
#include "reference/spec/dtype.h"

HWY_BEFORE_NAMESPACE();
namespace v3b::kern::HWY_NAMESPACE {
namespace {
using DU = hn::RebindToUnsigned<DF>;
using VU = hn::Vec<DU>;

// One value, for what is left of a row.
HWY_INLINE float value(float v) { return v; }
HWY_INLINE float value(uint16_t v) { return spec::to_float(spec::bf16{v}); }
template <class E>
HWY_INLINE E element(float v) {
  if constexpr (sizeof(E) == 4)
    return v;
  else
    return spec::to_bf16(v).bits;
}

struct Two {  // 2 * Lanes values
  VF a, b;
};
template <class E>
struct Raw;  // the same, rounded to E
template <>
struct Raw<float> {
  VF a, b;
};
template <>
struct Raw<uint16_t> {
  VU u;
};

HWY_INLINE Two widen(const Raw<float>& r) { return {r.a, r.b}; }
HWY_INLINE Two widen(const Raw<uint16_t>& r) {
  const DF df;
  const DU du;
  return {hn::BitCast(df, hn::ShiftLeft<16>(r.u)),
          hn::BitCast(df, hn::And(r.u, hn::Set(du, 0xffff0000u)))};
}
HWY_INLINE Raw<float> raw(const float* p) {
  const DF df;
  return {hn::LoadU(df, p), hn::LoadU(df, p + hn::Lanes(df))};
}
HWY_INLINE Raw<uint16_t> raw(const uint16_t* p) {
  return {hn::LoadU(DU(), reinterpret_cast<const uint32_t*>(p))};
}
template <class E>
HWY_INLINE Two load_two(const E* p) {
  return widen(raw(p));
}

// f32 bits + what rounds them to nearest even at bit 16. A NaN whose payload is all ones would overflow: its low half
// is cleared of that first (kAnyNan); values that came from bf16 through arithmetic have no such NaN.
template <bool kAnyNan>
HWY_INLINE VU rounded(VF v) {
  const DU du;
  const VU u = hn::BitCast(du, v);
  const VU odd = hn::And(hn::ShiftRight<16>(u), hn::Set(du, 1u));
  const VU r = hn::Add(u, hn::Add(odd, hn::Set(du, 0x7fffu)));
  if constexpr (!kAnyNan) return r;
  return hn::IfThenElse(hn::RebindMask(du, hn::IsNaN(v)), hn::Or(u, hn::Set(du, 0x400000u)), r);
}

// Whether round_two<E, true> runs here, and the name of the level that it makes.
template <class E>
bool native_bf16() {
  return sizeof(E) == 2 && HWY_TARGET <= HWY_AVX3 && cpu_features().avx512_bf16;
}
template <class E>
const char* target_name() {
  return native_bf16<E>() ? "avx512_bf16" : hwy::TargetName(HWY_TARGET);
}

// kNative: AVX512_BF16's conversion (rounds denormals to zero), written out, since this file's target is below it.
template <class E, bool kNative>
HWY_INLINE Raw<E> round_two(VF a, VF b) {
  if constexpr (sizeof(E) == 4) {
    return {a, b};
  } else {
    const DU du;
#if HWY_TARGET <= HWY_AVX3
    if constexpr (kNative) {
      alignas(64) static constexpr uint16_t kZip[32] = {0,  16, 1,  17, 2,  18, 3,  19, 4,  20, 5,
                                                        21, 6,  22, 7,  23, 8,  24, 9,  25, 10, 26,
                                                        11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
      __m512i both;
      __asm__("vcvtne2ps2bf16 %1, %2, %0" : "=v"(both) : "v"(a.raw), "v"(b.raw));
      return {VU{_mm512_permutexvar_epi16(_mm512_load_si512(reinterpret_cast<const __m512i*>(kZip)),
                                          both)}};
    }
#endif
    const VU low = hn::ShiftRight<16>(rounded<false>(a)), high = rounded<false>(b);
    return {hn::Or(low, hn::And(high, hn::Set(du, 0xffff0000u)))};
  }
}
// bf16 of a, then of b: for vectors that are neighbours in memory.
template <bool kNative>
HWY_INLINE Raw<uint16_t> round_in_order(VF a, VF b) {
  const DU du;
#if HWY_TARGET <= HWY_AVX3
  if constexpr (kNative) {
    __m512i both;
    __asm__("vcvtne2ps2bf16 %1, %2, %0" : "=v"(both) : "v"(a.raw), "v"(b.raw));
    return {VU{both}};
  }
#endif
  const hn::RebindToSigned<DF> di;
  const hn::Rebind<uint16_t, DF> d16;
  const hn::Repartition<uint16_t, DF> both;
  const auto narrow = [&](VF v) {
    return hn::DemoteTo(d16, hn::BitCast(di, hn::ShiftRight<16>(rounded<false>(v))));
  };
  return {hn::BitCast(du, hn::Combine(both, narrow(b), narrow(a)))};
}
template <bool kStream>
HWY_INLINE void put(const Raw<float>& r, float* p) {
  const DF df;
  if constexpr (kStream) {
    hn::Stream(r.a, df, p);
    hn::Stream(r.b, df, p + hn::Lanes(df));
  } else {
    hn::StoreU(r.a, df, p);
    hn::StoreU(r.b, df, p + hn::Lanes(df));
  }
}
template <bool kStream>
HWY_INLINE void put(const Raw<uint16_t>& r, uint16_t* p) {
  if constexpr (kStream)
    hn::Stream(r.u, DU(), reinterpret_cast<uint32_t*>(p));
  else
    hn::StoreU(r.u, DU(), reinterpret_cast<uint32_t*>(p));
}
// One line of a stream that is read, `bytes` ahead: the hardware's own prefetch stops at 4 KiB pages.
template <class E>
HWY_INLINE void ahead(const E* p, int64_t bytes = 1024) {
  hwy::Prefetch(reinterpret_cast<const char*>(p) + bytes);
}
// A line that is wanted when L1 will have been used for something else.
template <class E>
HWY_INLINE void to_l2(const E* p) {
  __builtin_prefetch(p, 0, 2);
}
// All lines of a Two: two of them where it is two vectors of 512 bits.
template <class E>
HWY_INLINE void lines_ahead(const E* p, int64_t bytes = 1024) {
  ahead(p, bytes);
  if constexpr (2 * hn::MaxLanes(DF()) * sizeof(E) > 64) ahead(p, bytes + 64);
}

// Squares added to two sums. kNative: both squares of a word in one instruction, to the first (denormals count as zero).
template <bool kNative>
HWY_INLINE void add_squares(const Raw<float>& v, VF& s0, VF& s1) {
  s0 = hn::MulAdd(v.a, v.a, s0);
  s1 = hn::MulAdd(v.b, v.b, s1);
}
template <bool kNative>
HWY_INLINE void add_squares(const Raw<uint16_t>& v, VF& s0, VF& s1) {
#if HWY_TARGET <= HWY_AVX3
  if constexpr (kNative) {
    __asm__("vdpbf16ps %1, %1, %0" : "+v"(s0.raw) : "v"(v.u.raw));
    return;
  }
#endif
  const Two w = widen(v);
  s0 = hn::MulAdd(w.a, w.a, s0);
  s1 = hn::MulAdd(w.b, w.b, s1);
}

}  // namespace
}  // namespace v3b::kern::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();
#endif
