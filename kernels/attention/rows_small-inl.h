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

constexpr int64_t kSmallRows = 6;
constexpr int64_t kSmallBlock = 64;  // keys

struct SmallScratch {
  Buffer<float> q, o, s;
  Buffer<uint8_t> row;
};

// Dot products of one key (bf16 or f32 elements) with R queries laid as q[r][0..dp): in f32 as they
// are, in bf16 the even elements then the odd ones of each group of 2 * kLanes, so that pairs need
// no shuffle.
template <bool kBf16, int R>
HWY_INLINE void dot_key(const uint8_t* key, int64_t d, const float* q, int64_t dp, float* out,
                        int64_t out_stride) {
  const DF df;
  const DU du;
  constexpr int64_t step = kBf16 ? 2 * kLanes : kLanes, e = kBf16 ? 2 : 4;
  VF acc[R], acc2[R];
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) acc[r] = acc2[r] = hn::Zero(df);
  const auto add = [&](VU u, int64_t c) HWY_ATTR {
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      const float* qr = q + r * dp + c;
      if constexpr (kBf16) {
        acc[r] = hn::MulAdd(pair_even(u), hn::LoadU(df, qr), acc[r]);
        acc2[r] = hn::MulAdd(pair_odd(u), hn::LoadU(df, qr + kLanes), acc2[r]);
      } else {
        acc[r] = hn::MulAdd(hn::BitCast(df, u), hn::LoadU(df, qr), acc[r]);
      }
    }
  };
  int64_t c = 0;
  for (; c + step <= d; c += step)
    add(hn::LoadU(du, reinterpret_cast<const uint32_t*>(key + c * e)), c);
  if (c < d) {  // the row's end: never read past it
    alignas(64) uint8_t tail[64] = {};
    std::memcpy(tail, key + c * e, static_cast<size_t>((d - c) * e));
    add(hn::Load(du, reinterpret_cast<const uint32_t*>(tail)), c);
  }
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r)
    out[r * out_stride] = hn::GetLane(hn::SumOfLanes(df, hn::Add(acc[r], acc2[r])));
}

template <bool kBf16>
HWY_INLINE float element(const uint8_t* row, int64_t c) {
  if constexpr (kBf16) {
    uint16_t u;
    std::memcpy(&u, row + 2 * c, 2);
    return spec::to_float(spec::bf16{u});
  } else {
    float x;
    std::memcpy(&x, row + 4 * c, 4);
    return x;
  }
}
template <bool kBf16>
HWY_INLINE VF vector_at(const uint8_t* row, int64_t c) {
  if constexpr (kBf16) {
    const hn::Rebind<uint16_t, DU> d16;
    const auto half = hn::LoadU(d16, reinterpret_cast<const uint16_t*>(row) + c);
    return hn::BitCast(DF(), hn::ShiftLeft<16>(hn::PromoteTo(DU(), half)));
  } else {
    return hn::LoadU(DF(), reinterpret_cast<const float*>(row) + c);
  }
}

// o[r][c] += sum_j p[r][j] v_j[c] for n keys and R rows, NV vectors of c at a time in registers.
template <bool kBf16, int R, int NV, class RowAt>
HWY_INLINE int64_t add_columns(int64_t n, int64_t c, int64_t d, const RowAt& row, const float* p,
                               float* o, int64_t ldo) {
  const DF df;
  for (; c + NV * kLanes <= d; c += NV * kLanes) {
    VF acc[R][NV];
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
      for (int i = 0; i < NV; ++i) acc[r][i] = hn::LoadU(df, o + r * ldo + c + i * kLanes);
    }
    for (int64_t j = 0; j < n; ++j) {
      const uint8_t* v = row(j);
      VF x[NV];
#pragma GCC unroll 8
      for (int i = 0; i < NV; ++i) x[i] = vector_at<kBf16>(v, c + i * kLanes);
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) {
        const VF w = hn::Set(df, p[r * kSmallBlock + j]);
#pragma GCC unroll 8
        for (int i = 0; i < NV; ++i) acc[r][i] = hn::MulAdd(w, x[i], acc[r][i]);
      }
    }
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
      for (int i = 0; i < NV; ++i) hn::StoreU(acc[r][i], df, o + r * ldo + c + i * kLanes);
    }
  }
  return c;
}
template <bool kBf16, int R, class RowAt>
HWY_INLINE void add_values(int64_t n, int64_t d, const RowAt& row, const float* p, float* o,
                           int64_t ldo) {
  constexpr int NV = kManyRegs ? (R == 1 ? 8 : 4) : (R == 4 ? 2 : 4);
  int64_t c = add_columns<kBf16, R, NV>(n, 0, d, row, p, o, ldo);
  c = add_columns<kBf16, R, 1>(n, c, d, row, p, o, ldo);
  for (; c < d; ++c)
    for (int r = 0; r < R; ++r)
      for (int64_t j = 0; j < n; ++j)
        o[r * ldo + c] += p[r * kSmallBlock + j] * element<kBf16>(row(j), c);
}

// One block: scores of R rows against n keys, softmax, values added. visible(r) of these keys row r
// sees.
template <bool kBf16, int R, class KeyAt, class ValueAt, class Visible>
HWY_INLINE void small_block(const RowsTask& t, int64_t n, const KeyAt& key, const ValueAt& value,
                            const Visible& visible, const float* q, int64_t dp, float* s, float* o,
                            float* m, float* l) {
  const DF df;
  const float minus_inf = -std::numeric_limits<float>::infinity();
  const float scale_log2 =
      static_cast<float>(static_cast<double>(t.scale) * 1.44269504088896340736);
  for (int64_t i = 0; i < n; ++i) dot_key<kBf16, R>(key(i), t.d_qk, q, dp, s + i, kSmallBlock);
  for (int r = 0; r < R; ++r) {
    float* sr = s + r * kSmallBlock;
    for (int64_t i = visible(r); i < kSmallBlock; ++i) sr[i] = minus_inf;
    VF top = hn::Set(df, minus_inf);
    for (int64_t i = 0; i < kSmallBlock; i += kLanes) top = hn::Max(top, hn::LoadU(df, sr + i));
    const float now = std::max(m[r], hn::GetLane(hn::MaxOfLanes(df, top)) * scale_log2);
    const float base = now == minus_inf ? 0.0f : now;  // nothing visible yet: any finite base
    const float alpha = hn::GetLane(exp2_neg(hn::Set(df, m[r] - base)));
    VF sum = hn::Zero(df);
    for (int64_t i = 0; i < kSmallBlock; i += kLanes) {
      const VF p =
          exp2_neg(hn::MulSub(hn::LoadU(df, sr + i), hn::Set(df, scale_log2), hn::Set(df, base)));
      sum = hn::Add(sum, p);
      hn::StoreU(p, df, sr + i);
    }
    m[r] = now;
    l[r] = l[r] * alpha + hn::GetLane(hn::SumOfLanes(df, sum));
    if (alpha != 1.0f)
      for (int64_t c = 0; c < t.d_v; ++c) o[r * t.d_v + c] *= alpha;
  }
  add_values<kBf16, R>(n, t.d_v, value, s, o, t.d_v);
}

template <bool kBf16, class Finish>
void run_small_as(const RowsTask& t, SmallScratch& w, const Finish& finish) {
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
  float m[kSmallRows], l[kSmallRows];
  for (int64_t r = 0; r < t.R; ++r) m[r] = -std::numeric_limits<float>::infinity(), l[r] = 0;
  const int64_t end = std::min(t.j1, t.lim0 + (t.R - 1) / t.inner);
  for (int64_t j = t.j0; j < end; j += kSmallBlock) {
    const int64_t n = std::min(kSmallBlock, end - j);
    if (!in_place) fetch_keys<kBf16>(t.keys, j, n, w.row.data(), key_bytes, nullptr);
    const auto key = [&](int64_t i) HWY_ATTR -> const uint8_t* {
      return in_place ? t.keys.k1 + key_row(t.keys, j + i) * t.keys.k1_stride
                      : w.row.data() + i * key_bytes;
    };
    const auto value = [&](int64_t i) HWY_ATTR -> const uint8_t* {
      return t.keys.v ? t.keys.v + key_row(t.keys, j + i) * t.keys.v_stride : key(i);
    };
    for (int64_t r = 0; r < t.R; r += 4) {
      const auto visible = [&](int64_t i) {
        return std::clamp<int64_t>(t.lim0 + (r + i) / t.inner - j, 0, n);
      };
      const float* q = w.q.data() + r * dp;
      float *s = w.s.data(), *o = w.o.data() + r * dv;
      switch (std::min<int64_t>(4, t.R - r)) {
        case 1:
          small_block<kBf16, 1>(t, n, key, value, visible, q, dp, s, o, m + r, l + r);
          break;
        case 2:
          small_block<kBf16, 2>(t, n, key, value, visible, q, dp, s, o, m + r, l + r);
          break;
        case 3:
          small_block<kBf16, 3>(t, n, key, value, visible, q, dp, s, o, m + r, l + r);
          break;
        default:
          small_block<kBf16, 4>(t, n, key, value, visible, q, dp, s, o, m + r, l + r);
      }
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
