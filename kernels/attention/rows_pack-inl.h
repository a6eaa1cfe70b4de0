// Fetching of keys, values and queries into the tile formats of rows.h. Per-target header.
// clang-format off
#if defined(V3B_ROWS_PACK_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef V3B_ROWS_PACK_INL_H_
#undef V3B_ROWS_PACK_INL_H_
#else
#define V3B_ROWS_PACK_INL_H_
#endif
// clang-format on

#include "kernels/attention/rows.h"
#include "kernels/attention/rows_tile-inl.h"

HWY_BEFORE_NAMESPACE();
namespace v3b::kern::HWY_NAMESPACE {
namespace {

HWY_INLINE int64_t key_row(const KeySource& s, int64_t j) {
  return s.table ? int64_t{s.table[j / s.page]} * s.page + j % s.page : j;
}

// 16-bit or 32-bit rounding of c' = code * scale to bf16 (SPEC 1.9), kept in a float's upper half.
HWY_INLINE VF round_bf16(VF x) {
  const DU du;
  const VU u = hn::BitCast(du, x);
  const VU odd = hn::And(hn::ShiftRight<16>(u), hn::Set(du, 1));
  const VU r = hn::And(hn::Add(u, hn::Add(odd, hn::Set(du, 0x7fff))), hn::Set(du, 0xffff0000u));
  return hn::IfThenElse(hn::IsNaN(x), x, hn::BitCast(DF(), r));
}

// E4M3 codes to floats: exponent and mantissa moved to a float's place and scaled by 2^120 (exact,
// subnormals too).
HWY_INLINE VF from_e4m3(VU code) {
  const DU du;
  const DF df;
  const VU mag = hn::And(code, hn::Set(du, 0x7f));
  const VU sign = hn::ShiftLeft<24>(hn::And(code, hn::Set(du, 0x80)));
  const VF v = hn::Mul(hn::BitCast(df, hn::ShiftLeft<20>(mag)), hn::Set(df, 0x1p120f));
  const VU r = hn::Or(hn::BitCast(du, v), sign);
  return hn::BitCast(df,
                     hn::IfThenElse(hn::Eq(mag, hn::Set(du, 0x7f)), hn::Set(du, 0x7fc00000u), r));
}

// One record as bf16 or f32 elements.
template <bool kBf16>
HWY_INLINE void read_record(const uint8_t* rec, int64_t d_c, int64_t d_r, uint8_t* out) {
  const DF df;
  const DU du;
  const hn::Rebind<uint8_t, DU> d8;
  const hn::Rebind<uint16_t, DU> d16;
  uint16_t* out16 = reinterpret_cast<uint16_t*>(out);
  float* out32 = reinterpret_cast<float*>(out);
  const int64_t tiles = (d_c + 127) / 128;
  for (int64_t t = 0; t < tiles; ++t) {
    float scale;
    std::memcpy(&scale, rec + d_c + 4 * t, 4);
    const VF vs = hn::Set(df, scale);
    const int64_t last = HWY_MIN(d_c, (t + 1) * 128);
    int64_t i = t * 128;
    for (; i + kLanes <= last; i += kLanes) {
      const VF c = round_bf16(hn::Mul(from_e4m3(hn::PromoteTo(du, hn::LoadU(d8, rec + i))), vs));
      if (kBf16)
        hn::StoreU(hn::DemoteTo(d16, hn::BitCast(DI(), hn::ShiftRight<16>(hn::BitCast(du, c)))),
                   d16, out16 + i);
      else
        hn::StoreU(c, df, out32 + i);
    }
    for (; i < last; ++i) {
      const float c = spec::to_float(spec::to_bf16(spec::to_float(spec::f8e4m3{rec[i]}) * scale));
      if (kBf16)
        out16[i] = spec::to_bf16(c).bits;
      else
        out32[i] = c;
    }
  }
  const uint8_t* rope = rec + d_c + 4 * tiles;
  if (kBf16) {
    std::memcpy(out16 + d_c, rope, static_cast<size_t>(2 * d_r));
  } else {
    for (int64_t i = 0; i < d_r; ++i) {
      uint16_t u;
      std::memcpy(&u, rope + 2 * i, 2);
      out32[d_c + i] = spec::to_float(spec::bf16{u});
    }
  }
}

// Keys [j, j + n) -> dst rows of row_bytes (a multiple of 4; zeros past the key). `record`: reads FP8 records to bf16,
// or null.
template <bool kBf16>
void fetch_keys(const KeySource& s, int64_t j, int64_t n, uint8_t* dst, int64_t row_bytes,
                void (*record)(const uint8_t*, int64_t, int64_t, uint8_t*)) {
  constexpr int64_t e = kBf16 ? 2 : 4;
  const size_t n1 = static_cast<size_t>(s.d1 * e), n2 = static_cast<size_t>(s.d2 * e);
  for (int64_t i = 0; i < n; ++i, dst += row_bytes) {
    const int64_t row = key_row(s, j + i);
    if (s.record) {
      if (kBf16 && record)
        record(s.k1 + row * s.k1_stride, s.d1, s.d2, dst);
      else
        read_record<kBf16>(s.k1 + row * s.k1_stride, s.d1, s.d2, dst);
    } else {
      std::memcpy(dst, s.k1 + row * s.k1_stride, n1);
      if (n2) std::memcpy(dst + n1, s.k2 + row * s.k2_stride, n2);
    }
    if (const int64_t used = (s.d1 + s.d2) * e; used < row_bytes)
      std::memset(dst + used, 0, static_cast<size_t>(row_bytes - used));
  }
}

// Panels of a width of d lanes: full ones of kPanel, then one of as many vectors as are needed.
HWY_INLINE int64_t panel_vectors(int64_t d, int64_t first) {
  return HWY_MIN(kNr, (d - first + kLanes - 1) / kLanes);
}

// V rows row(i), i in [0, n) of d elements -> panels [k][width], k = n (f32) or pairs of rows
// (bf16). Lanes past d are zero; an odd last row is paired with zeros.
template <bool kBf16, class RowAt>
void pack_values(int64_t n, int64_t d, const RowAt& row, uint32_t* dst) {
  const DU du;
  const hn::Rebind<uint16_t, DU> d16;
  const int64_t K = kBf16 ? (n + 1) / 2 : n;
  alignas(64) static constexpr uint16_t kZeros[64] = {};
  for (int64_t k = 0; k < K; ++k) {
    const uint8_t* r0 = row(kBf16 ? 2 * k : k);
    const bool pair = kBf16 && 2 * k + 1 < n;
    const uint8_t* r1 = pair ? row(2 * k + 1) : nullptr;
    for (int64_t p = 0; p < d; p += kPanel) {
      const int64_t width = panel_vectors(d, p) * kLanes, end = HWY_MIN(d, p + width);
      uint32_t* out = dst + p * K + k * width;  // earlier panels are all full
      int64_t c = p;
      for (; c + kLanes <= end; c += kLanes, out += kLanes) {
        if constexpr (kBf16) {
          const VU lo =
              hn::PromoteTo(du, hn::LoadU(d16, reinterpret_cast<const uint16_t*>(r0) + c));
          const VU hi = hn::PromoteTo(
              du, hn::LoadU(d16, pair ? reinterpret_cast<const uint16_t*>(r1) + c : kZeros));
          hn::StoreU(hn::Or(lo, hn::ShiftLeft<16>(hi)), du, out);
        } else {
          hn::StoreU(hn::LoadU(du, reinterpret_cast<const uint32_t*>(r0) + c), du, out);
        }
      }
      for (; c < p + width; ++c, ++out) {
        uint32_t u = 0;
        if (c < end) {
          if constexpr (kBf16) {
            uint16_t h0, h1 = 0;
            std::memcpy(&h0, r0 + 2 * c, 2);
            if (pair) std::memcpy(&h1, r1 + 2 * c, 2);
            u = h0 | static_cast<uint32_t>(h1) << 16;
          } else {
            std::memcpy(&u, r0 + 4 * c, 4);
          }
        }
        *out = u;
      }
    }
  }
}

// Queries -> panels [k][width] of rows, K units of elements or pairs of them; units past d_qk and lanes past R are
// zero.
template <bool kBf16>
void pack_queries(const RowsTask& t, int64_t K, const RowsKernels& kn, uint32_t* dst) {
  constexpr int64_t e = kBf16 ? 2 : 4;
  const int64_t whole = kBf16 ? t.d_qk / 2 : t.d_qk;
  const auto row_at = [&](int64_t r) {
    return static_cast<const uint8_t*>(t.q) +
           e * ((r / t.inner) * t.q_outer + (r % t.inner) * t.q_inner);
  };
  for (int64_t p = 0; p < t.R; p += kPanel) {
    const int64_t width = panel_vectors(t.R, p) * kLanes;
    uint32_t* panel = dst + p * K;
    if (kBf16 && kn.pack_lanes && t.d_qk % 2 == 0) {
      for (int64_t l = 0; l < width; l += 16) {
        const uint8_t* rows[16];
        const int64_t count = HWY_MIN(t.R - p - l, 16);
        for (int64_t i = 0; i < count; ++i) rows[i] = row_at(p + l + i);
        kn.pack_lanes(rows, count, whole, panel + l, width);
      }
      std::memset(panel + whole * width, 0, static_cast<size_t>((K - whole) * width * 4));
      continue;
    }
    for (int64_t l = 0; l < width; ++l) {
      const int64_t r = p + l;
      for (int64_t k = r < t.R ? whole : 0; k < K; ++k) panel[k * width + l] = 0;
      if (r >= t.R) continue;
      const uint8_t* q = row_at(r);
      for (int64_t k = 0; k < whole; ++k) std::memcpy(panel + k * width + l, q + 4 * k, 4);
      if (kBf16 && t.d_qk % 2 != 0) {
        uint16_t last;
        std::memcpy(&last, q + 4 * whole, 2);
        panel[whole * width + l] = last;
      }
    }
  }
}

}  // namespace
}  // namespace v3b::kern::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();
#endif
