// Portable block-scaled FP8 product (Highway: AVX2, AVX-512 without BF16). A weight row is widened
// to float once and used for all activation rows, which were widened before; a strip of kStrip
// weight rows keeps its floats in L1/L2 while the activation rows pass.
#include <omp.h>

#include <algorithm>
#include <cstring>

#include "kernels/core/buffer.h"
#include "kernels/core/cpu.h"
#include "kernels/gemm/fp8.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/gemm/fp8_gemm.cpu_simd.cpp"
#include <hwy/foreach_target.h>
#include <hwy/highway.h>

HWY_BEFORE_NAMESPACE();
namespace v3b::kern {
namespace HWY_NAMESPACE {
namespace {
namespace hn = hwy::HWY_NAMESPACE;

constexpr int64_t kBlock = 128;

// E4M3 -> float: the code's exponent and mantissa moved into place are the value times 2^-120,
// subnormals included, so one multiplication is exact for all codes but NaN.
void widen_row(const uint8_t* q, int64_t n, float* out) {
  const hn::ScalableTag<float> d;
  const hn::RebindToUnsigned<decltype(d)> du;
  const hn::Rebind<uint8_t, decltype(d)> d8;
  const int64_t lanes = static_cast<int64_t>(hn::Lanes(d));
  const auto scale = hn::Set(d, 0x1p120F);
  const auto nan = hn::BitCast(d, hn::Set(du, 0x7fc00000u));
  int64_t i = 0;
  for (; i + lanes <= n; i += lanes) {
    const auto c = hn::PromoteTo(du, hn::LoadU(d8, q + i));
    const auto mag = hn::And(c, hn::Set(du, 0x7fu));
    const auto sign = hn::ShiftLeft<24>(hn::And(c, hn::Set(du, 0x80u)));
    auto v = hn::Mul(hn::BitCast(d, hn::Or(hn::ShiftLeft<20>(mag), sign)), scale);
    v = hn::IfThenElse(hn::RebindMask(d, hn::Eq(mag, hn::Set(du, 0x7fu))), nan, v);
    hn::StoreU(v, d, out + i);
  }
  for (; i < n; ++i) out[i] = spec::to_float(spec::f8e4m3{q[i]});
}

// Columns [n0, n1) of all rows; af: activations as float [m, k]; wf: scratch [2, k].
void columns(const spec::Fp8GemmArgs& g, const float* af, float* wf, int64_t n0, int64_t n1) {
  const hn::ScalableTag<float> d;
  const int64_t lanes = static_cast<int64_t>(hn::Lanes(d)), kb = spec::fp8_blocks(g.k);
  const auto* qb = reinterpret_cast<const uint8_t*>(g.qb);
  for (int64_t n = n0; n < n1; n += 2) {
    const bool two = n + 1 < n1;
    widen_row(qb + n * g.k, g.k, wf);
    if (two) widen_row(qb + (n + 1) * g.k, g.k, wf + g.k);
    const float* w0 = wf;
    const float* w1 = two ? wf + g.k : wf;
    for (int64_t i = 0; i < g.m; ++i) {
      const float* a = af + i * g.k;
      auto s0 = hn::Zero(d), s1 = hn::Zero(d);
      float t0 = 0, t1 = 0;
      for (int64_t b = 0; b < kb; ++b) {
        auto p0 = hn::Zero(d), p1 = hn::Zero(d), r0 = hn::Zero(d), r1 = hn::Zero(d);
        const int64_t end = std::min(g.k, (b + 1) * kBlock);
        int64_t k = b * kBlock;
        for (; k + 2 * lanes <= end; k += 2 * lanes) {
          const auto va = hn::LoadU(d, a + k), vb = hn::LoadU(d, a + k + lanes);
          p0 = hn::MulAdd(va, hn::LoadU(d, w0 + k), p0);
          p1 = hn::MulAdd(va, hn::LoadU(d, w1 + k), p1);
          r0 = hn::MulAdd(vb, hn::LoadU(d, w0 + k + lanes), r0);
          r1 = hn::MulAdd(vb, hn::LoadU(d, w1 + k + lanes), r1);
        }
        const float sa = g.sa[i * kb + b];
        const float c0 = sa * g.sb[n / kBlock * kb + b];
        const float c1 = two ? sa * g.sb[(n + 1) / kBlock * kb + b] : 0.0F;
        s0 = hn::MulAdd(hn::Add(p0, r0), hn::Set(d, c0), s0);
        s1 = hn::MulAdd(hn::Add(p1, r1), hn::Set(d, c1), s1);
        float u0 = 0, u1 = 0;
        for (; k < end; ++k) u0 += a[k] * w0[k], u1 += a[k] * w1[k];
        t0 += u0 * c0, t1 += u1 * c1;
      }
      const float v[2] = {hn::GetLane(hn::SumOfLanes(d, s0)) + t0,
                          hn::GetLane(hn::SumOfLanes(d, s1)) + t1};
      for (int64_t j = 0; j < (two ? 2 : 1); ++j) {
        if (g.c_type == spec::DType::bf16) {
          static_cast<spec::bf16*>(g.c)[i * g.n + n + j] = spec::to_bf16(v[j]);
        } else {
          static_cast<float*>(g.c)[i * g.n + n + j] = v[j];
        }
      }
    }
  }
}

const char* isa() { return hwy::TargetName(HWY_TARGET); }

}  // namespace
}  // namespace HWY_NAMESPACE
}  // namespace v3b::kern
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace v3b::kern {
HWY_EXPORT(widen_row);
HWY_EXPORT(columns);
HWY_EXPORT(isa);

std::string fp8_gemm_cpu_simd_isa() { return HWY_DYNAMIC_DISPATCH(isa)(); }

void fp8_gemm_cpu_simd(const spec::Fp8GemmArgs& g) noexcept {
  if (g.m == 0 || g.n == 0) return;
  if (g.k == 0) {
    std::memset(g.c, 0, static_cast<size_t>(g.m * g.n * spec::dtype_bytes(g.c_type)));
    return;
  }
  thread_local Buffer<float> wide;
  wide.reserve_discard(g.m * g.k);
  float* af = wide.data();
  HWY_DYNAMIC_DISPATCH(widen_row)(reinterpret_cast<const uint8_t*>(g.qa), g.m * g.k, af);
  const int64_t strip = 64;
#pragma omp parallel if (num_threads() > 1 && g.n * g.k >= (128 << 10))
  {
    thread_local Buffer<float> weights;
    weights.reserve_discard(2 * g.k);
#pragma omp for schedule(dynamic, 1)
    for (int64_t n = 0; n < g.n; n += strip) {
      HWY_DYNAMIC_DISPATCH(columns)(g, af, weights.data(), n, std::min(g.n, n + strip));
    }
  }
}

void fp8_dequant_weight(int64_t rows, int64_t cols, const spec::f8e4m3* codes, const float* scales,
                        spec::DType out_type, void* out) noexcept {
  const int64_t kb = spec::fp8_blocks(cols);
#pragma omp parallel if (num_threads() > 1 && rows * cols >= (256 << 10))
  {
    thread_local Buffer<float> row;
    row.reserve_discard(cols);
#pragma omp for schedule(static)
    for (int64_t r = 0; r < rows; ++r) {
      float* v = row.data();
      HWY_DYNAMIC_DISPATCH(widen_row)(reinterpret_cast<const uint8_t*>(codes) + r * cols, cols, v);
      const float* s = scales + r / spec::kFp8Block * kb;
      for (int64_t b = 0; b < kb; ++b) {
        const int64_t end = std::min(cols, (b + 1) * spec::kFp8Block);
        for (int64_t c = b * spec::kFp8Block; c < end; ++c) v[c] *= s[b];
      }
      if (out_type == spec::DType::bf16) {
        auto* o = static_cast<spec::bf16*>(out) + r * cols;
        for (int64_t c = 0; c < cols; ++c) o[c] = spec::to_bf16(v[c]);
      } else {
        std::memcpy(static_cast<float*>(out) + r * cols, v,
                    static_cast<size_t>(cols) * sizeof(float));
      }
    }
  }
}

}  // namespace v3b::kern
#endif  // HWY_ONCE
