// Rows into the latent cache: copies, or the 8-bit record (SPEC 1.9), bit for bit what the
// reference writes.
#define HWY_DISABLED_TARGETS HWY_SSE4  // the build needs AVX2 anyway: less to compile
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/attention/mla_cache_write.cpu_simd.cpp"
// clang-format off
#include "hwy/foreach_target.h"  // IWYU pragma: keep
// clang-format on
#include <algorithm>
#include <cmath>
#include <cstring>

#include "hwy/highway.h"
#include "kernels/attention/attention.h"
#include "kernels/core/team.h"

HWY_BEFORE_NAMESPACE();
namespace v3b::kern::HWY_NAMESPACE {
namespace {
namespace hn = hwy::HWY_NAMESPACE;
using DF = hn::ScalableTag<float>;
using DU = hn::RebindToUnsigned<DF>;
using VF = hn::Vec<DF>;
using VU = hn::Vec<DU>;
constexpr int64_t kTile = 128;

// As spec::to_f8e4m3: nearest even, saturating, NaN to the NaN code.
HWY_INLINE VU to_e4m3(VF x) {
  const DF df;
  const DU du;
  const VU u = hn::BitCast(du, x), a = hn::And(u, hn::Set(du, 0x7fffffffu));
  const VU sign = hn::And(hn::ShiftRight<24>(u), hn::Set(du, 0x80u));
  // below 2^-6: multiples of 2^-9, rounded by adding 2^14
  const VU low = hn::Sub(hn::BitCast(du, hn::Add(hn::BitCast(df, a), hn::Set(df, 0x1p14f))),
                         hn::Set(du, 0x46800000u));
  const VU tie = hn::And(hn::ShiftRight<20>(a), hn::Set(du, 1));
  const VU high = hn::Sub(hn::ShiftRight<20>(hn::Add(hn::Add(a, hn::Set(du, 0x7ffffu)), tie)),
                          hn::Set(du, 120u << 3));
  VU code = hn::IfThenElse(hn::Lt(a, hn::Set(du, 0x3c800000u)), low, high);
  code = hn::IfThenElse(hn::Gt(a, hn::Set(du, 0x43dfffffu)), hn::Set(du, 0x7eu), code);
  code = hn::IfThenElse(hn::Gt(a, hn::Set(du, 0x7f800000u)), hn::Set(du, 0x7fu), code);
  return hn::Or(code, sign);
}

// 128 floats (the last tile zero-padded) -> codes and their scale.
float quantise_tile(const float* c, spec::KvFormat format, uint8_t* codes) {
  const DF df;
  const hn::Rebind<uint8_t, DU> d8;
  const int64_t N = static_cast<int64_t>(hn::Lanes(df));
  VF top = hn::Zero(df);
  for (int64_t i = 0; i < kTile; i += N) top = hn::Max(hn::Abs(hn::LoadU(df, c + i)), top);
  const float a = std::max(hn::GetLane(hn::MaxOfLanes(df, top)) / 448.0f, 1e-4f);
  const float scale = format == spec::KvFormat::fp8_656_pow2 ? spec::ceil_pow2(a) : a;
  const VF vs = hn::Set(df, scale);
  for (int64_t i = 0; i < kTile; i += N)
    hn::StoreU(hn::U8FromU32(to_e4m3(hn::Div(hn::LoadU(df, c + i), vs))), d8, codes + i);
  return scale;
}

void to_floats(const void* src, spec::DType dtype, int64_t n, float* dst) {
  if (dtype == spec::DType::f32) {
    std::memcpy(dst, src, static_cast<size_t>(4 * n));
    return;
  }
  const uint16_t* p = static_cast<const uint16_t*>(src);
  for (int64_t i = 0; i < n; ++i) dst[i] = spec::to_float(spec::bf16{p[i]});
}

void write_record(const spec::MlaCacheWriteArgs& a, const uint8_t* c, const uint8_t* k_pe,
                  uint8_t* row) {
  const int64_t e = spec::dtype_bytes(a.dtype), tiles = (a.d_c + kTile - 1) / kTile;
  for (int64_t t = 0; t < tiles; ++t) {
    const int64_t n = std::min(kTile, a.d_c - t * kTile);
    alignas(64) float values[kTile] = {};
    alignas(64) uint8_t codes[kTile];
    to_floats(c + t * kTile * e, a.dtype, n, values);
    const float scale = quantise_tile(values, a.kv_format, codes);
    std::memcpy(row + t * kTile, codes, static_cast<size_t>(n));
    std::memcpy(row + a.d_c + 4 * t, &scale, 4);
  }
  uint8_t* rope = row + a.d_c + 4 * tiles;
  if (a.dtype == spec::DType::bf16) {
    std::memcpy(rope, k_pe, static_cast<size_t>(2 * a.d_r));
    return;
  }
  for (int64_t i = 0; i < a.d_r; ++i) {
    float x;
    std::memcpy(&x, k_pe + 4 * i, 4);
    const uint16_t bits = spec::to_bf16(x).bits;
    std::memcpy(rope + 2 * i, &bits, 2);
  }
}
}  // namespace
}  // namespace v3b::kern::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace v3b::kern {
HWY_EXPORT(write_record);

void mla_cache_write_cpu_simd(const spec::MlaCacheWriteArgs& a) noexcept {
  const int64_t e = spec::dtype_bytes(a.dtype);
  const int64_t row_bytes = spec::mla_cache_row_bytes(a.kv_format, a.dtype, a.d_c, a.d_r);
  // Quantising costs some passes more than copying.
  const int threads = team_for(static_cast<double>(a.T) * static_cast<double>(row_bytes) *
                                   (a.kv_format != spec::KvFormat::bf16 ? 8 : 2),
                               0);
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t t = 0; t < a.T; ++t) {
    if (a.slots[t] < 0) continue;
    const uint8_t* c = static_cast<const uint8_t*>(a.c) + t * a.c_stride * e;
    const uint8_t* k_pe = static_cast<const uint8_t*>(a.k_pe) + t * a.k_pe_stride * e;
    uint8_t* row = static_cast<uint8_t*>(a.cache) + a.slots[t] * row_bytes;
    if (a.kv_format != spec::KvFormat::bf16) {
      HWY_DYNAMIC_DISPATCH(write_record)(a, c, k_pe, row);
    } else {
      std::memcpy(row, c, static_cast<size_t>(a.d_c * e));
      std::memcpy(row + a.d_c * e, k_pe, static_cast<size_t>(a.d_r * e));
    }
  }
}
}  // namespace v3b::kern
#endif
