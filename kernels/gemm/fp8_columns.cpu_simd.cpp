// Few rows against FP8 weights without bf16 products (Highway: AVX2, AVX-512): a weight row is widened to float once
// and used for all activation rows, which were widened before.
#include <omp.h>

#include <algorithm>
#include <cstring>

#include "kernels/core/buffer.h"
#include "kernels/core/cpu.h"
#include "kernels/gemm/fp8.h"
#include "kernels/gemm/tile.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/gemm/fp8_columns.cpu_simd.cpp"
#include <hwy/foreach_target.h>
#include <hwy/highway.h>

HWY_BEFORE_NAMESPACE();
namespace v3b::kern {
namespace HWY_NAMESPACE {
namespace {
namespace hn = hwy::HWY_NAMESPACE;

constexpr int64_t kBlock = 128;

// Columns [n0, n1) of all rows; af: activations as float [m, k]; wf: scratch [2, k].
void columns(const spec::Fp8GemmArgs& g, const float* af, float* wf, int64_t n0, int64_t n1) {
  const hn::ScalableTag<float> d;
  const int64_t lanes = static_cast<int64_t>(hn::Lanes(d)), kb = spec::fp8_blocks(g.k);
  const auto* qb = reinterpret_cast<const uint8_t*>(g.qb);
  for (int64_t n = n0; n < n1; n += 2) {
    const bool two = n + 1 < n1;
    tile_widen_cpu_simd(qb + n * g.k, spec::DType::f8e4m3, g.k, wf);
    if (two) tile_widen_cpu_simd(qb + (n + 1) * g.k, spec::DType::f8e4m3, g.k, wf + g.k);
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

}  // namespace
}  // namespace HWY_NAMESPACE
}  // namespace v3b::kern
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace v3b::kern {
HWY_EXPORT(columns);

void fp8_columns_cpu_simd(const spec::Fp8GemmArgs& g, const float* af, float* wf, int64_t n0,
                          int64_t n1) noexcept {
  HWY_DYNAMIC_DISPATCH(columns)(g, af, wf, n0, n1);
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
      tile_widen_cpu_simd(codes + r * cols, spec::DType::f8e4m3, cols, v);
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
