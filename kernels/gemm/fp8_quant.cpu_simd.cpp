// FP8 quantisation in Highway: one pass for the largest magnitude of 128 (or 128x128) values, one for the codes, while
// they lie in L1. Codes equal the reference's: bf16 by table look-up (fp8_codes.h) where the level is AVX512_BF16, else whole
// blocks by the short way of fp8_encode-inl.h and the rest by spec::to_f8e4m3 on lanes.
#include <algorithm>
#include <bit>

#include "kernels/core/cpu.h"
#include "kernels/core/team.h"
#include "kernels/gemm/fp8.h"
#include "kernels/gemm/fp8_codes.h"
#include "kernels/norm_rope/stream.h"

#define HWY_DISABLED_TARGETS HWY_SSE4  // the build needs AVX2 anyway: less to compile
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/gemm/fp8_quant.cpu_simd.cpp"
#include <hwy/cache_control.h>
#include <hwy/foreach_target.h>
#include <hwy/highway.h>

#include "kernels/gemm/fp8_encode-inl.h"

HWY_BEFORE_NAMESPACE();
namespace v3b::kern {
namespace HWY_NAMESPACE {
namespace {
namespace hn = hwy::HWY_NAMESPACE;
using Df = hn::ScalableTag<float>;
using Du = hn::RebindToUnsigned<Df>;

constexpr int64_t kBlock = 128;

HWY_INLINE hn::Vec<Df> load(Df d, const float* p) { return hn::LoadU(d, p); }
HWY_INLINE hn::Vec<Df> load(Df d, const spec::bf16* p) {
  const hn::Rebind<hwy::bfloat16_t, Df> dh;
  return hn::PromoteTo(d, hn::LoadU(dh, reinterpret_cast<const hwy::bfloat16_t*>(p)));
}
HWY_INLINE float load1(float x) { return x; }
HWY_INLINE float load1(spec::bf16 x) { return spec::to_float(x); }

template <class T>
float amax_row(const T* x, int64_t n) {
  const Df d;
  const int64_t lanes = static_cast<int64_t>(hn::Lanes(d));
  auto m = hn::Zero(d);
  int64_t i = 0;
  for (; i + lanes <= n; i += lanes) m = hn::Max(m, hn::Abs(load(d, x + i)));
  float r = hn::GetLane(hn::MaxOfLanes(d, m));
  for (; i < n; ++i) r = std::max(r, std::abs(load1(x[i])));
  return r;
}

HWY_INLINE hn::Vec<Du> encode(Df d, hn::Vec<Df> v) {
  const Du du;
  const auto u = hn::BitCast(du, v);
  const auto sign = hn::And(hn::ShiftRight<24>(u), hn::Set(du, 0x80u));
  const auto a = hn::And(u, hn::Set(du, 0x7fffffffu));
  const auto odd = hn::And(hn::ShiftRight<20>(a), hn::Set(du, 1u));
  const auto r = hn::Add(a, hn::Add(hn::Set(du, 0x7ffffu), odd));
  const auto normal = hn::Sub(hn::ShiftRight<20>(r), hn::Set(du, 120u << 3));
  const auto small = hn::Sub(hn::BitCast(du, hn::Add(hn::BitCast(d, a), hn::Set(d, 0x1p14F))),
                             hn::Set(du, 0x46800000u));
  auto code = hn::IfThenElse(hn::Lt(a, hn::Set(du, 0x3c800000u)), small, normal);
  code = hn::IfThenElse(hn::Lt(a, hn::Set(du, 0x43e00000u)), hn::Min(code, hn::Set(du, 0x7eu)),
                        hn::Set(du, 0x7eu));
  code = hn::IfThenElse(hn::Gt(a, hn::Set(du, 0x7f800000u)), hn::Set(du, 0x7fu), code);
  return hn::Or(code, sign);
}

template <class T>
void encode_row(const T* x, int64_t n, float scale, uint8_t* out) {
  const Df d;
  const hn::Rebind<uint8_t, Df> d8;
  const hn::RebindToSigned<Df> di;
  const int64_t lanes = static_cast<int64_t>(hn::Lanes(d));
  const auto s = hn::Set(d, scale);
  int64_t i = 0;
  for (; i + lanes <= n; i += lanes) {
    const auto code = encode(d, hn::Div(load(d, x + i), s));
    hn::StoreU(hn::DemoteTo(d8, hn::BitCast(di, code)), d8, out + i);
  }
  for (; i < n; ++i) out[i] = spec::to_f8e4m3(load1(x[i]) / scale).bits;
}

float act_scale(float amax, spec::ActScale kind) {
  const float s = std::max(amax, 1e-4F) / 448.0F;
  return kind == spec::ActScale::ue8m0 ? spec::ceil_pow2(s) : s;
}

float weight_scale(float amax) { return amax > 0 ? amax / 448.0F : 1.0F; }

// One row's part of a block with its scale; whole rows of 128 the short way where it is right.
template <bool kPower, bool kStream, class T>
HWY_INLINE void encode_part(const T* x, int64_t n, float scale, uint8_t* codes) {
  if (n == kBlock && fp8::plain_scale(scale) && fp8::encode_row<kPower, kStream>(x, scale, codes))
    return;
  encode_row(x, n, scale, codes);
}
// Largest magnitude of rows x n values. `finite` becomes false where a NaN or an infinity is among them.
template <class T>
HWY_INLINE float amax_of(const T* x, int64_t rows, int64_t stride, int64_t n, bool& finite) {
  if (n == kBlock) {
    const uint32_t top = fp8::top_bits(x, rows, stride);
    if (top < 0x7f800000u) return std::bit_cast<float>(top);
    finite = false;
  }
  float amax = 0;  // parts of a block take the long way anyway
  for (int64_t r = 0; r < rows; ++r) amax = std::max(amax, amax_row(x + r * stride, n));
  return amax;
}

template <bool kPower, bool kStream, class T>
void activation_rows(const spec::Fp8QuantArgs& a, int64_t r0, int64_t r1) {
  // Some blocks at a time: from a block's values to its codes there are two reductions and two divisions of latency, more
  // than the core overlaps by itself.
  constexpr int64_t kGroup = 8;
  const int64_t kb = spec::fp8_blocks(a.cols);
  for (int64_t r = r0; r < r1; ++r) {
    const T* x = static_cast<const T*>(a.x) + r * a.cols;
    auto* codes = reinterpret_cast<uint8_t*>(a.codes) + r * a.cols;
    float* scales = a.scales + r * kb;
    for (int64_t b0 = 0; b0 < kb; b0 += kGroup) {
      const int64_t b1 = std::min(kb, b0 + kGroup);
      const auto width = [&](int64_t b) { return std::min(kBlock, a.cols - b * kBlock); };
      bool finite[kGroup];
      for (int64_t b = b0; b < b1; ++b) {
        finite[b - b0] = true;
        scales[b] = act_scale(amax_of(x + b * kBlock, 1, 0, width(b), finite[b - b0]), a.act_scale);
      }
      for (int64_t b = b0; b < b1; ++b) {
        const int64_t c = b * kBlock;
        const char* next = reinterpret_cast<const char*>(x + c + kGroup * kBlock);
        for (size_t i = 0; i < kBlock * sizeof(T); i += 64) hwy::Prefetch(next + i);
        if (finite[b - b0])
          encode_part<kPower, kStream>(x + c, width(b), scales[b], codes + c);
        else
          encode_row(x + c, width(b), scales[b], codes + c);
      }
    }
  }
}

// r0 a multiple of 128. The rows of a block lie apart: those of the next block are asked for while this one is encoded.
template <bool kStream, class T>
void weight_rows(const spec::Fp8QuantArgs& a, int64_t r0, int64_t r1) {
  const T* x = static_cast<const T*>(a.x);
  auto* codes = reinterpret_cast<uint8_t*>(a.codes);
  const int64_t kb = spec::fp8_blocks(a.cols);
  for (int64_t r = r0; r < r1; r += kBlock) {
    const int64_t rows = std::min(kBlock, r1 - r);
    for (int64_t b = 0; b < kb; ++b) {
      const int64_t c = b * kBlock, n = std::min(kBlock, a.cols - c);
      bool finite = true;
      const float amax = amax_of(x + r * a.cols + c, rows, a.cols, n, finite);
      const float s = weight_scale(amax);
      a.scales[r / kBlock * kb + b] = s;
      for (int64_t i = 0; i < rows; ++i) {
        const int64_t at = (r + i) * a.cols + c;
        const char* next = reinterpret_cast<const char*>(x + at + kBlock);
        for (size_t k = 0; k < kBlock * sizeof(T); k += 64) hwy::Prefetch(next + k);
        if (finite)
          encode_part<false, kStream>(x + at, n, s, codes + at);
        else
          encode_row(x + at, n, s, codes + at);
      }
    }
  }
}

// Rows [r0, r1): r0 a multiple of 128 for weights.
template <bool kStream, class T>
void rows_of(const spec::Fp8QuantArgs& a, int64_t r0, int64_t r1) {
  if (a.weight)
    weight_rows<kStream, T>(a, r0, r1);
  else if (a.act_scale == spec::ActScale::ue8m0)
    activation_rows<true, kStream, T>(a, r0, r1);
  else
    activation_rows<false, kStream, T>(a, r0, r1);
}

// Blocks [b0, b1) of columns of the rows [r0, r1) alone, any values.
template <class T>
void part_of(const spec::Fp8QuantArgs& a, int64_t r0, int64_t r1, int64_t b0, int64_t b1) {
  const int64_t kb = spec::fp8_blocks(a.cols), step = a.weight ? kBlock : 1;
  const T* x = static_cast<const T*>(a.x);
  auto* codes = reinterpret_cast<uint8_t*>(a.codes);
  for (int64_t r = r0; r < r1; r += step)
    for (int64_t b = b0; b < b1; ++b) {
      const int64_t c = b * kBlock, n = std::min(kBlock, a.cols - c), rows = std::min(step, r1 - r);
      float amax = 0;
      for (int64_t i = 0; i < rows; ++i)
        amax = std::max(amax, amax_row(x + (r + i) * a.cols + c, n));
      const float s = a.weight ? weight_scale(amax) : act_scale(amax, a.act_scale);
      a.scales[r / step * kb + b] = s;
      for (int64_t i = 0; i < rows; ++i)
        encode_row(x + (r + i) * a.cols + c, n, s, codes + (r + i) * a.cols + c);
    }
}
void part(const spec::Fp8QuantArgs& a, int64_t r0, int64_t r1, int64_t b0, int64_t b1) {
  a.dtype == spec::DType::bf16 ? part_of<spec::bf16>(a, r0, r1, b0, b1)
                               : part_of<float>(a, r0, r1, b0, b1);
}

void rows(const spec::Fp8QuantArgs& a, int64_t r0, int64_t r1, bool stream) {
  if (a.dtype == spec::DType::bf16)
    stream ? rows_of<true, spec::bf16>(a, r0, r1) : rows_of<false, spec::bf16>(a, r0, r1);
  else
    stream ? rows_of<true, float>(a, r0, r1) : rows_of<false, float>(a, r0, r1);
}

const char* isa() { return hwy::TargetName(HWY_TARGET); }

}  // namespace
}  // namespace HWY_NAMESPACE
}  // namespace v3b::kern
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace v3b::kern {
HWY_EXPORT(rows);
HWY_EXPORT(part);
HWY_EXPORT(isa);
namespace {

// Rows [r0, r1) by table look-up, what that leaves (last columns, values that are not finite) one by one.
void rows_by_table(const spec::Fp8QuantArgs& a, int64_t r0, int64_t r1, bool stream) {
  const Fp8CodeTable& table = fp8_code_table();
  const Fp8Scale kind =
      a.act_scale == spec::ActScale::ue8m0 ? Fp8Scale::act_ue8m0 : Fp8Scale::act_fp32;
  const int64_t kb = spec::fp8_blocks(a.cols), whole = a.cols / spec::kFp8Block;
  const auto* x = static_cast<const uint16_t*>(a.x);
  auto* codes = reinterpret_cast<uint8_t*>(a.codes);
  const auto rest = [&](int64_t r, int64_t end, int64_t b0, int64_t b1) {
    HWY_DYNAMIC_DISPATCH(part)(a, r, end, b0, b1);
  };
  if (a.weight) {
    for (int64_t r = r0; r < r1; r += spec::kFp8Block) {
      const int64_t end = std::min(r1, r + spec::kFp8Block);
      for (int64_t b = 0; b < whole; b += kFp8WeightBlocks) {
        const int64_t at = r * a.cols + b * spec::kFp8Block,
                      n = std::min(kFp8WeightBlocks, whole - b);
        const uint32_t undone = fp8_quantise_weights_cpu_avx512bf16(
            table, stream, x + at, a.cols, end - r, n, codes + at,
            a.scales + r / spec::kFp8Block * kb + b);
        for (int64_t i = 0; i < n; ++i)
          if ((undone >> i & 1u) != 0) rest(r, end, b + i, b + i + 1);
      }
      if (whole < kb) rest(r, end, whole, kb);
    }
  } else {
    const bool dense = whole == kb;  // then all rows are one
    for (int64_t r = r0; r < r1; r = dense ? r1 : r + 1) {
      const int64_t blocks = dense ? (r1 - r) * kb : whole;
      for (int64_t b = 0; b < blocks; ++b) {
        const int64_t at = r * a.cols + b * spec::kFp8Block;
        b += fp8_quantise_blocks_cpu_avx512bf16(table, kind, stream, x + at, blocks - b, codes + at,
                                                a.scales + r * kb + b);
        if (b < blocks) rest(r + b / kb, r + b / kb + 1, b % kb, b % kb + 1);
      }
      if (!dense) rest(r, r + 1, whole, kb);
    }
  }
}

bool by_table(const spec::Fp8QuantArgs& a) {
  return a.dtype == spec::DType::bf16 && fp8_codes_avx512bf16_supported();
}

void some_rows(const spec::Fp8QuantArgs& a, int64_t r0, int64_t r1, bool stream) {
  if (by_table(a)) return rows_by_table(a, r0, r1, stream);
  HWY_DYNAMIC_DISPATCH(rows)(a, r0, r1, stream);
}

}  // namespace

Fp8Values fp8_values(spec::ActScale act_scale, bool stream) noexcept {
  return {fp8_codes_avx512bf16_supported() ? &fp8_code_table() : nullptr, act_scale, stream};
}
void fp8_quant_values(const Fp8Values& how, const uint16_t* bf16_bits, int64_t n,
                      spec::f8e4m3* codes, float* scales) noexcept {
  const bool stream = how.stream && n % 64 == 0 && line_aligned(codes, 0);
  if (how.table != nullptr && n % spec::kFp8Block == 0) {
    const int64_t blocks = n / spec::kFp8Block;
    if (fp8_quantise_blocks_cpu_avx512bf16(
            *static_cast<const Fp8CodeTable*>(how.table),
            how.act_scale == spec::ActScale::ue8m0 ? Fp8Scale::act_ue8m0 : Fp8Scale::act_fp32,
            stream, bf16_bits, blocks, reinterpret_cast<uint8_t*>(codes), scales, false) == blocks)
      return;
  }
  some_rows({1, n, false, how.act_scale, spec::DType::bf16, bf16_bits, codes, scales}, 0, 1,
            stream);
}

std::string fp8_quant_cpu_simd_isa(spec::DType dtype) {
  if (dtype == spec::DType::bf16 && fp8_codes_avx512bf16_supported()) return "avx512_bf16+vbmi";
  return HWY_DYNAMIC_DISPATCH(isa)();
}

void fp8_quant_cpu_simd(const spec::Fp8QuantArgs& a) noexcept {
  // Two passes over what is read, and some twenty instructions for sixteen values: three times the bytes' cost. By table
  // look-up they cost no more than the bytes.
  const bool table = by_table(a);
  const double bytes = static_cast<double>(a.rows * a.cols * (spec::dtype_bytes(a.dtype) + 1));
  const bool stream = stream_output(a.rows * a.cols) && line_aligned(a.codes, a.cols);
  for_spans(
      a.rows, team_for((table ? 1 : 3) * bytes, 0),
      [&](int64_t lo, int64_t hi) {
        some_rows(a, lo, hi, stream);
        if (stream) hwy::FlushStream();
      },
      a.weight ? spec::kFp8Block : 1);
}

}  // namespace v3b::kern
#endif  // HWY_ONCE
