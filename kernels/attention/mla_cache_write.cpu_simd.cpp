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
#include "kernels/core/buffer.h"
#include "kernels/core/team.h"
#include "kernels/gemm/fp8_codes.h"
#include "kernels/gemm/fp8_encode-inl.h"
#include "kernels/norm_rope/rope.h"
#include "kernels/norm_rope/stream.h"
#include "kernels/norm_rope/stream_copy.h"

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

float tile_scale(float amax, spec::KvFormat format) {
  const float a = std::max(amax / 448.0f, 1e-4f);
  return format == spec::KvFormat::fp8_656_pow2 ? spec::ceil_pow2(a) : a;
}

// A whole tile of finite values as it lies in memory; false: the long way is needed.
template <class T>
HWY_INLINE bool quantise_whole(const T* c, spec::KvFormat format, uint8_t* codes, float& scale) {
  const uint32_t top = fp8::top_bits(c, 1, 0);
  if (top >= 0x7f800000u) return false;
  scale = tile_scale(std::bit_cast<float>(top), format);
  if (!fp8::plain_scale(scale)) return false;
  return format == spec::KvFormat::fp8_656_pow2 ? fp8::encode_row<true, false>(c, scale, codes)
                                                : fp8::encode_row<false, false>(c, scale, codes);
}

// 128 floats (the last tile zero-padded) -> codes and their scale.
float quantise_tile(const float* c, spec::KvFormat format, uint8_t* codes) {
  const DF df;
  const hn::Rebind<uint8_t, DU> d8;
  const int64_t N = static_cast<int64_t>(hn::Lanes(df));
  VF top = hn::Zero(df);
  for (int64_t i = 0; i < kTile; i += N) top = hn::Max(hn::Abs(hn::LoadU(df, c + i)), top);
  const float scale = tile_scale(hn::GetLane(hn::MaxOfLanes(df, top)), format);
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
    const uint8_t* from = c + t * kTile * e;
    float whole;
    if (n == kTile && (e == 2 ? quantise_whole(reinterpret_cast<const spec::bf16*>(from),
                                               a.kv_format, row + t * kTile, whole)
                              : quantise_whole(reinterpret_cast<const float*>(from), a.kv_format,
                                               row + t * kTile, whole))) {
      std::memcpy(row + a.d_c + 4 * t, &whole, 4);
      continue;
    }
    alignas(64) float values[kTile] = {};
    alignas(64) uint8_t codes[kTile];
    to_floats(from, a.dtype, n, values);
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
namespace {
constexpr int64_t kKvTile = 128;

// Whole tiles of bf16 by table look-up, others the long way.
void write_record(const spec::MlaCacheWriteArgs& a, const uint8_t* c, const uint8_t* k_pe,
                  uint8_t* row) {
  const int64_t tiles = a.d_c / kKvTile;
  if (a.dtype == spec::DType::bf16 && a.d_c % kKvTile == 0 && fp8_codes_avx512bf16_supported()) {
    const Fp8Scale kind =
        a.kv_format == spec::KvFormat::fp8_656_pow2 ? Fp8Scale::record_pow2 : Fp8Scale::record_free;
    if (fp8_quantise_blocks_cpu_avx512bf16(fp8_code_table(), kind, false,
                                           reinterpret_cast<const uint16_t*>(c), tiles, row,
                                           reinterpret_cast<float*>(row + a.d_c)) == tiles) {
      std::memcpy(row + a.d_c + 4 * tiles, k_pe, static_cast<size_t>(2 * a.d_r));
      return;
    }
  }
  HWY_DYNAMIC_DISPATCH(write_record)(a, c, k_pe, row);
}

// A prompt's records: made in a buffer that lies to the cache lines as the row does, and written a row later, when the
// stores have left the core: whole lines past the caches, only the two ends by plain stores.
class RecordStream {
 public:
  explicit RecordStream(int64_t bytes)
      : bytes_(bytes), stride_((bytes + 127) / 64 * 64), held_(2 * stride_, false) {}
  ~RecordStream() { write_out(); }
  RecordStream(const RecordStream&) = delete;
  RecordStream& operator=(const RecordStream&) = delete;
  uint8_t* begin(uint8_t* row) {
    uint8_t* made = held_.data() + (odd_ ? stride_ : 0) + reinterpret_cast<uintptr_t>(row) % 64;
    odd_ = !odd_;
    next_row_ = row, next_ = made;
    return made;
  }
  void end() {
    write_out();
    row_ = next_row_, made_ = next_;
  }

 private:
  void write_out() {
    if (row_ == nullptr) return;
    const int64_t head =
        std::min(bytes_, static_cast<int64_t>(-reinterpret_cast<uintptr_t>(row_) % 64));
    const int64_t lines = (bytes_ - head) / 64 * 64;
    std::memcpy(row_, made_, static_cast<size_t>(head));
    lines_past_caches(row_ + head, made_ + head, lines);
    std::memcpy(row_ + head + lines, made_ + head + lines,
                static_cast<size_t>(bytes_ - head - lines));
    row_ = nullptr;
  }
  int64_t bytes_, stride_;
  Buffer<uint8_t> held_;
  bool odd_ = false;
  uint8_t *row_ = nullptr, *next_row_ = nullptr;
  const uint8_t *made_ = nullptr, *next_ = nullptr;
};

// The rows of k_pe as they go into the cache: where they lie, or rotated, some at a time, into a buffer in L1.
class KeyRows {
 public:
  KeyRows(const spec::MlaCacheWriteArgs& a, const MlaCacheRope* rope, int64_t hi)
      : a_(a),
        rope_(rope),
        hi_(hi),
        e_(spec::dtype_bytes(a.dtype)),
        rotated_(rope != nullptr ? kRows * a.d_r * e_ : 0, false) {}
  const uint8_t* row(int64_t t) {  // t grows from call to call
    if (rope_ == nullptr) return static_cast<const uint8_t*>(a_.k_pe) + t * a_.k_pe_stride * e_;
    if (t >= end_) rotate(t);
    return rotated_.data() + (t - first_) * a_.d_r * e_;
  }

 private:
  static constexpr int64_t kRows = 32;
  void rotate(int64_t t) {
    first_ = t, end_ = std::min(hi_, t + kRows);
    for (int64_t soon = end_; soon < std::min(hi_, end_ + kRows);
         ++soon)  // no hardware knows where these lie
      for (int64_t i = 0; i < a_.d_r / 2; i += 16) {
        __builtin_prefetch(rope_->cos + rope_->positions[soon] * (a_.d_r / 2) + i);
        __builtin_prefetch(rope_->sin + rope_->positions[soon] * (a_.d_r / 2) + i);
      }
    rope_cpu_simd({end_ - t, 1, a_.d_r, rope_->form, false, a_.dtype, a_.dtype,
                   static_cast<const uint8_t*>(a_.k_pe) + t * a_.k_pe_stride * e_, a_.k_pe_stride,
                   a_.d_r, rotated_.data(), a_.d_r, a_.d_r, rope_->cos, rope_->sin,
                   rope_->positions + t});
  }
  const spec::MlaCacheWriteArgs& a_;
  const MlaCacheRope* rope_;
  int64_t hi_, e_, first_ = 0, end_ = 0;
  Buffer<uint8_t> rotated_;
};

// rope: null, or what k_pe still needs.
void write_rows(const spec::MlaCacheWriteArgs& a, const MlaCacheRope* rope) {
  const int64_t e = spec::dtype_bytes(a.dtype);
  const int64_t row_bytes = spec::mla_cache_row_bytes(a.kv_format, a.dtype, a.d_c, a.d_r);
  const bool record = a.kv_format != spec::KvFormat::bf16;
  // Quantising costs some passes more than copying.
  const int threads =
      team_for(static_cast<double>(a.T) * static_cast<double>(row_bytes) * (record ? 4 : 2), 0);
  const uint8_t* c = static_cast<const uint8_t*>(a.c);
  uint8_t* cache = static_cast<uint8_t*>(a.cache);
  // A prompt's rows are read by later steps; a decode step's few at once, so they stay in the caches.
  constexpr int64_t kPromptBytes = 256 << 10;
  const bool prompt = a.T * row_bytes >= kPromptBytes;
  const bool stream = !record && prompt && line_aligned(cache, row_bytes) &&
                      line_aligned(nullptr, a.d_c * e) && line_aligned(nullptr, a.d_r * e);
  constexpr int64_t kRowsAhead = 4;
  const auto records = [&](int64_t lo, int64_t hi) {
    RecordStream out(row_bytes);
    KeyRows k_pe(a, rope, hi);
    for (int64_t t = lo; t < hi; ++t) {
      const int64_t soon = t + kRowsAhead;
      if (soon < hi && a.slots[soon] >= 0) {  // the lines at both ends
        const uint8_t* row = cache + a.slots[soon] * row_bytes;
        __builtin_prefetch(row, 1), __builtin_prefetch(row + row_bytes - 1, 1);
      }
      const char* ask = reinterpret_cast<const char*>(c + (t + 2) * a.c_stride * e);
      for (int64_t i = 0; i < a.d_c * e; i += 64) __builtin_prefetch(ask + i);
      if (a.slots[t] < 0) continue;
      write_record(a, c + t * a.c_stride * e, k_pe.row(t),
                   out.begin(cache + a.slots[t] * row_bytes));
      out.end();
    }
  };
  for_spans(a.T, threads, [&](int64_t lo, int64_t hi) {
    if (record && prompt) {
      records(lo, hi);
      return end_streaming();
    }
    KeyRows k_pe(a, rope, hi);
    for (int64_t t = lo; t < hi; ++t) {
      const int64_t soon = t + kRowsAhead;
      if (!stream && soon < hi && a.slots[soon] >= 0)  // no hardware knows where the next slot lies
        for (int64_t i = 0; i < row_bytes; i += 64)
          __builtin_prefetch(cache + a.slots[soon] * row_bytes + i, 1);
      if (a.slots[t] < 0) continue;
      const uint8_t* from = c + t * a.c_stride * e;
      const uint8_t* from_pe = k_pe.row(t);
      uint8_t* row = cache + a.slots[t] * row_bytes;
      if (record) {
        write_record(a, from, from_pe, row);
      } else if (stream) {
        copy_past_caches(row, from, a.d_c * e, from + a.c_stride * e);
        copy_past_caches(row + a.d_c * e, from_pe, a.d_r * e, from_pe + a.k_pe_stride * e);
      } else {
        std::memcpy(row, from, static_cast<size_t>(a.d_c * e));
        std::memcpy(row + a.d_c * e, from_pe, static_cast<size_t>(a.d_r * e));
      }
    }
    if (stream) end_streaming();
  });
}
}  // namespace

void mla_cache_write_cpu_simd(const spec::MlaCacheWriteArgs& a) noexcept { write_rows(a, nullptr); }
void mla_cache_write_rope_cpu_simd(const spec::MlaCacheWriteArgs& a,
                                   const MlaCacheRope& rope) noexcept {
  write_rows(a, &rope);
}
const char* mla_cache_write_cpu_simd_isa(const spec::MlaCacheWriteShape& s) noexcept {
  const bool table = s.kv_format != spec::KvFormat::bf16 && s.dtype == spec::DType::bf16 &&
                     s.d_c % kKvTile == 0 && fp8_codes_avx512bf16_supported();
  return table ? "avx512_bf16+vbmi" : attention_cpu_simd_isa(spec::DType::f32);
}
}  // namespace v3b::kern
#endif
