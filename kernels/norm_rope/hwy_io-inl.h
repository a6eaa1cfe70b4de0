// Loads and stores of f32 and bf16 rows as f32 lanes, for the Highway files of this folder.
// Per-target header: included again for every target, no include guard in the usual sense.
#if defined(V3B_KERNELS_NORM_ROPE_HWY_IO_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef V3B_KERNELS_NORM_ROPE_HWY_IO_INL_H_
#undef V3B_KERNELS_NORM_ROPE_HWY_IO_INL_H_
#else
#define V3B_KERNELS_NORM_ROPE_HWY_IO_INL_H_
#endif

#include <cstring>

#include "hwy/highway.h"

HWY_BEFORE_NAMESPACE();
namespace v3b::kern::HWY_NAMESPACE {
namespace {
namespace hn = hwy::HWY_NAMESPACE;
using DF = hn::ScalableTag<float>;
using VF = hn::Vec<DF>;

// row(t) for t < T, on a team only where `threads` (team_for) asks for one.
template <class Row>
void for_rows(int64_t T, int threads, const Row& row) {
  if (T == 1 || threads == 1) {
    for (int64_t t = 0; t < T; ++t) row(t);
    return;
  }
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t t = 0; t < T; ++t) row(t);
}

// uint16_t stands for bf16 bits.
HWY_INLINE VF load(DF df, const float* p) { return hn::LoadU(df, p); }
HWY_INLINE VF load(DF df, const uint16_t* p) {
  const hn::Rebind<uint16_t, DF> d16;
  const hn::RebindToUnsigned<DF> du;
  return hn::BitCast(df, hn::ShiftLeft<16>(hn::PromoteTo(du, hn::LoadU(d16, p))));
}
HWY_INLINE auto round_bf16_bits(DF /*df*/, VF v) {  // round to nearest even, NaN stays NaN
  const hn::RebindToUnsigned<DF> du;
  const auto u = hn::BitCast(du, v);
  const auto odd = hn::And(hn::ShiftRight<16>(u), hn::Set(du, 1u));
  const auto r = hn::ShiftRight<16>(hn::Add(u, hn::Add(odd, hn::Set(du, 0x7fffu))));
  const auto nan = hn::Or(hn::ShiftRight<16>(u), hn::Set(du, 0x40u));
  return hn::IfThenElse(hn::RebindMask(du, hn::IsNaN(v)), nan, r);
}
HWY_INLINE VF round_bf16(DF df, VF v) {
  return hn::BitCast(df, hn::ShiftLeft<16>(round_bf16_bits(df, v)));
}
HWY_INLINE void store(DF df, VF v, float* p) { hn::StoreU(v, df, p); }
HWY_INLINE void store(DF df, VF v, uint16_t* p) {
  const hn::Rebind<uint16_t, DF> d16;
  const hn::RebindToSigned<DF> di;
  hn::StoreU(hn::DemoteTo(d16, hn::BitCast(di, round_bf16_bits(df, v))), d16, p);
}
// The first n < Lanes elements; the rest of the vector is `fill`.
template <class T>
HWY_INLINE VF load_tail(DF df, const T* p, size_t n, float fill = 0.0F) {
  HWY_ALIGN float wide[hn::MaxLanes(DF())];
  HWY_ALIGN T buf[hn::MaxLanes(DF())] = {};
  std::memcpy(buf, p, n * sizeof(T));
  const VF v = load(df, buf);
  if (fill == 0.0F) return v;
  hn::StoreU(v, df, wide);
  for (size_t i = n; i < hn::Lanes(df); ++i) wide[i] = fill;
  return hn::LoadU(df, wide);
}
template <class T>
HWY_INLINE void store_tail(DF df, VF v, T* p, size_t n) {
  HWY_ALIGN T buf[hn::MaxLanes(DF())];
  store(df, v, buf);
  std::memcpy(p, buf, n * sizeof(T));
}
HWY_INLINE float sum(DF df, VF v) { return hn::GetLane(hn::SumOfLanes(df, v)); }

}  // namespace
}  // namespace v3b::kern::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();
#endif
