// One to three rows against keys: too few to fill SIMD lanes with rows, so lanes run along the head
// dimension. Bound by reading keys and values once. Per-target header.
// clang-format off
#if defined(V3B_ROWS_SMALL_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef V3B_ROWS_SMALL_INL_H_
#undef V3B_ROWS_SMALL_INL_H_
#else
#define V3B_ROWS_SMALL_INL_H_
#endif
// clang-format on

#include <algorithm>
#include <limits>

#include "kernels/attention/rows.h"
#include "kernels/attention/rows_pack-inl.h"
#include "kernels/core/buffer.h"

HWY_BEFORE_NAMESPACE();
namespace v3b::kern::HWY_NAMESPACE {
namespace {

constexpr int64_t kSmallRows = 3;
constexpr int64_t kSmallBlock = 64;  // keys

struct SmallScratch {
  Buffer<float> q, o, s;
  Buffer<uint8_t> row;
};

// Dot products of one key (bf16 or f32 elements) with R queries laid as q[r][0..dp): in f32 as they
// are, in bf16 the even elements then the odd ones of each group of 2 * kLanes, so that pairs need
// no shuffle.
template <bool kBf16>
HWY_INLINE void dot_key(const uint8_t* key, int64_t d, const float* q, int64_t dp, int64_t R,
                        float* out, int64_t out_stride) {
  const DF df;
  const DU du;
  constexpr int64_t step = kBf16 ? 2 * kLanes : kLanes, e = kBf16 ? 2 : 4;
  VF acc[kSmallRows], acc2[kSmallRows];
  for (int64_t r = 0; r < kSmallRows; ++r) acc[r] = acc2[r] = hn::Zero(df);
  int64_t c = 0;
  alignas(64) uint8_t tail[128];
  while (c < d) {
    const uint8_t* p = key + c * e;
    if (c + step > d) {  // the row's end: never read past it
      std::memset(tail, 0, sizeof tail);
      std::memcpy(tail, p, static_cast<size_t>((d - c) * e));
      p = tail;
    }
    const VU u = hn::LoadU(du, reinterpret_cast<const uint32_t*>(p));
    for (int64_t r = 0; r < R; ++r) {
      const float* qr = q + r * dp + c;
      if constexpr (kBf16) {
        acc[r] = hn::MulAdd(pair_even(u), hn::LoadU(df, qr), acc[r]);
        acc2[r] = hn::MulAdd(pair_odd(u), hn::LoadU(df, qr + kLanes), acc2[r]);
      } else {
        acc[r] = hn::MulAdd(hn::BitCast(df, u), hn::LoadU(df, qr), acc[r]);
      }
    }
    c += step;
  }
  for (int64_t r = 0; r < R; ++r)
    out[r * out_stride] = hn::GetLane(hn::SumOfLanes(df, hn::Add(acc[r], acc2[r])));
}

// o[c] += sum_j p[j] v_j[c] for n rows: four vectors of c at a time, in registers.
template <bool kBf16, class RowAt>
HWY_INLINE void add_values(int64_t n, int64_t d, const RowAt& row, const float* p, float* o) {
  const DF df;
  const DU du;
  const hn::Rebind<uint16_t, DU> d16;
  constexpr int64_t e = kBf16 ? 2 : 4;
  const auto load = [&](const uint8_t* v, int64_t c) HWY_ATTR {
    if constexpr (kBf16)
      return hn::BitCast(df, hn::ShiftLeft<16>(hn::PromoteTo(
                                 du, hn::LoadU(d16, reinterpret_cast<const uint16_t*>(v) + c))));
    else
      return hn::LoadU(df, reinterpret_cast<const float*>(v) + c);
  };
  int64_t c = 0;
  for (; c + 8 * kLanes <= d; c += 8 * kLanes) {
    VF acc[8];
    for (int64_t i = 0; i < 8; ++i) acc[i] = hn::LoadU(df, o + c + i * kLanes);
    for (int64_t j = 0; j < n; ++j) {
      const uint8_t* v = row(j);
      const VF w = hn::Set(df, p[j]);
      for (int64_t i = 0; i < 8; ++i) acc[i] = hn::MulAdd(w, load(v, c + i * kLanes), acc[i]);
    }
    for (int64_t i = 0; i < 8; ++i) hn::StoreU(acc[i], df, o + c + i * kLanes);
  }
  for (; c + kLanes <= d; c += kLanes) {
    VF acc = hn::LoadU(df, o + c);
    for (int64_t j = 0; j < n; ++j) acc = hn::MulAdd(hn::Set(df, p[j]), load(row(j), c), acc);
    hn::StoreU(acc, df, o + c);
  }
  for (; c < d; ++c)
    for (int64_t j = 0; j < n; ++j) {
      float x;
      if constexpr (kBf16) {
        uint16_t u;
        std::memcpy(&u, row(j) + e * c, 2);
        x = spec::to_float(spec::bf16{u});
      } else {
        std::memcpy(&x, row(j) + e * c, 4);
      }
      o[c] += p[j] * x;
    }
}

template <bool kBf16, class Finish>
void run_small_as(const RowsTask& t, SmallScratch& w, const Finish& finish) {
  const DF df;
  constexpr int64_t step = kBf16 ? 2 * kLanes : kLanes, e = kBf16 ? 2 : 4;
  const int64_t dp = (t.d_qk + step - 1) / step * step, dv = t.d_v;
  const int64_t key_bytes = (t.d_qk * e + 7) / 8 * 8;
  // Keys whose parts lie together are read in place; others (MLA's two parts, records) are put
  // together first.
  const bool in_place = !t.keys.record && t.keys.d2 == 0;
  w.q.reserve_discard(kSmallRows * dp);
  w.o.reserve_discard(kSmallRows * (dv + kLanes));
  w.s.reserve_discard(kSmallRows * kSmallBlock);
  w.row.reserve_discard(kSmallBlock * key_bytes);
  std::fill_n(w.q.data(), t.R * dp, 0.0f);
  std::fill_n(w.o.data(), t.R * dv, 0.0f);
  for (int64_t r = 0; r < t.R; ++r) {
    const uint8_t* q = static_cast<const uint8_t*>(t.q) +
                       e * ((r / t.inner) * t.q_outer + (r % t.inner) * t.q_inner);
    for (int64_t c = 0; c < t.d_qk; ++c) {
      if constexpr (kBf16) {
        uint16_t u;
        std::memcpy(&u, q + 2 * c, 2);
        w.q[r * dp + c / step * step + (c % 2) * kLanes + c % step / 2] =
            spec::to_float(spec::bf16{u});
      } else {
        std::memcpy(&w.q[r * dp + c], q + 4 * c, 4);
      }
    }
  }
  const float minus_inf = -std::numeric_limits<float>::infinity();
  const float scale_log2 =
      static_cast<float>(static_cast<double>(t.scale) * 1.44269504088896340736);
  float m[kSmallRows], l[kSmallRows];
  for (int64_t r = 0; r < t.R; ++r) m[r] = minus_inf, l[r] = 0;
  const int64_t end = std::min(t.j1, t.lim0 + (t.R - 1) / t.inner);
  for (int64_t j = t.j0; j < end; j += kSmallBlock) {
    const int64_t n = std::min(kSmallBlock, end - j);
    if (!in_place) fetch_keys<kBf16>(t.keys, j, n, w.row.data(), key_bytes);
    for (int64_t i = 0; i < n; ++i) {
      const uint8_t* key = in_place ? t.keys.k1 + key_row(t.keys, j + i) * t.keys.k1_stride
                                    : w.row.data() + i * key_bytes;
      dot_key<kBf16>(key, t.d_qk, w.q.data(), dp, t.R, w.s.data() + i, kSmallBlock);
    }
    for (int64_t r = 0; r < t.R; ++r) {
      float* s = w.s.data() + r * kSmallBlock;
      const int64_t visible = std::clamp<int64_t>(t.lim0 + r / t.inner - j, 0, n);
      if (visible == 0) continue;
      for (int64_t i = visible; i < kSmallBlock; ++i) s[i] = minus_inf;
      VF top = hn::Set(df, minus_inf);
      for (int64_t i = 0; i < kSmallBlock; i += kLanes) top = hn::Max(top, hn::LoadU(df, s + i));
      const float now = std::max(m[r], hn::GetLane(hn::MaxOfLanes(df, top)) * scale_log2);
      const float alpha = hn::GetLane(exp2_neg(hn::Set(df, m[r] - now)));
      VF sum = hn::Zero(df);
      for (int64_t i = 0; i < kSmallBlock; i += kLanes) {
        const VF p =
            exp2_neg(hn::MulSub(hn::LoadU(df, s + i), hn::Set(df, scale_log2), hn::Set(df, now)));
        sum = hn::Add(sum, p);
        hn::StoreU(p, df, s + i);
      }
      m[r] = now;
      l[r] = l[r] * alpha + hn::GetLane(hn::SumOfLanes(df, sum));
      float* o = w.o.data() + r * dv;
      if (alpha != 1.0f)
        for (int64_t c = 0; c < dv; ++c) o[c] *= alpha;
      if (t.keys.v)
        add_values<kBf16>(
            visible, dv,
            [&](int64_t i) { return t.keys.v + key_row(t.keys, j + i) * t.keys.v_stride; }, s, o);
      else if (in_place)
        add_values<kBf16>(
            visible, dv,
            [&](int64_t i) { return t.keys.k1 + key_row(t.keys, j + i) * t.keys.k1_stride; }, s, o);
      else
        add_values<kBf16>(
            visible, dv, [&](int64_t i) { return w.row.data() + i * key_bytes; }, s, o);
    }
  }
  for (int64_t r = 0; r < t.R; ++r) finish(r, w.o.data() + r * dv, m[r], l[r]);
}

template <class Finish>
void run_small(const RowsTask& t, SmallScratch& w, const Finish& finish) {
  if (t.dtype == spec::DType::bf16)
    run_small_as<true>(t, w, finish);
  else
    run_small_as<false>(t, w, finish);
}

}  // namespace
}  // namespace v3b::kern::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();
#endif
