// FP8 quantisation in Highway: one pass for the largest magnitude of 128 (or 128x128) values, one
// for the codes. The conversion is spec::to_f8e4m3 on lanes, so codes equal the reference's.
#include <omp.h>

#include <algorithm>

#include "kernels/core/buffer.h"
#include "kernels/core/cpu.h"
#include "kernels/gemm/fp8.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/gemm/fp8_quant.cpu_simd.cpp"
#include <hwy/foreach_target.h>
#include <hwy/highway.h>

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

// Rows [r0, r1): of single rows for activations, of 128-row blocks for weights (r0 a multiple of
// 128 then).
template <class T>
void rows_of(const spec::Fp8QuantArgs& a, int64_t r0, int64_t r1) {
  const T* x = static_cast<const T*>(a.x);
  auto* codes = reinterpret_cast<uint8_t*>(a.codes);
  const int64_t kb = spec::fp8_blocks(a.cols), step = a.weight ? kBlock : 1;
  for (int64_t r = r0; r < r1; r += step) {
    const int64_t rows = std::min(step, r1 - r);
    for (int64_t b = 0; b < kb; ++b) {
      const int64_t c = b * kBlock, n = std::min(kBlock, a.cols - c);
      float amax = 0;
      for (int64_t i = 0; i < rows; ++i)
        amax = std::max(amax, amax_row(x + (r + i) * a.cols + c, n));
      const float s = a.weight ? (amax > 0 ? amax / 448.0F : 1.0F) : act_scale(amax, a.act_scale);
      a.scales[r / step * kb + b] = s;
      for (int64_t i = 0; i < rows; ++i) {
        encode_row(x + (r + i) * a.cols + c, n, s, codes + (r + i) * a.cols + c);
      }
    }
  }
}

void rows(const spec::Fp8QuantArgs& a, int64_t r0, int64_t r1) {
  if (a.dtype == spec::DType::bf16) {
    rows_of<spec::bf16>(a, r0, r1);
  } else {
    rows_of<float>(a, r0, r1);
  }
}

const char* isa() { return hwy::TargetName(HWY_TARGET); }

}  // namespace
}  // namespace HWY_NAMESPACE
}  // namespace v3b::kern
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace v3b::kern {
HWY_EXPORT(rows);
HWY_EXPORT(isa);

std::string fp8_quant_cpu_simd_isa() { return HWY_DYNAMIC_DISPATCH(isa)(); }

void fp8_quant_cpu_simd(const spec::Fp8QuantArgs& a) noexcept {
  const int64_t step = a.weight ? spec::kFp8Block : 1;
  const int64_t units = (a.rows + step - 1) / step;
  if (num_threads() == 1 || a.rows * a.cols < (64 << 10))
    return HWY_DYNAMIC_DISPATCH(rows)(a, 0, a.rows);
#pragma omp parallel
  {
    const int64_t t = omp_get_num_threads(), i = omp_get_thread_num();
    HWY_DYNAMIC_DISPATCH(rows)
    (a, units * i / t * step, std::min(a.rows, units * (i + 1) / t * step));
  }
}

}  // namespace v3b::kern
#endif  // HWY_ONCE
