// FP8 codes on the CPU beyond the op's cases: every pair of significands that the look-up tables hold, values that are not
// finite, and the fused forms' bits.
#include <gtest/gtest.h>

#include <bit>
#include <cstring>
#include <vector>

#include "kernels/core/cpu.h"
#include "kernels/gemm/fp8.h"
#include "kernels/norm_rope/rmsnorm.h"
#include "kernels/norm_rope/swiglu.h"
#include "reference/fp8_quant.h"
#include "tests/normals.h"

namespace v3b {
namespace {

using spec::ActScale;
using spec::bf16;
using spec::DType;
using spec::f8e4m3;
using spec::fp8_blocks;

// bf16 values of all significands and exponents down to nothing beside each of the 128 significands of a largest value.
std::vector<bf16> all_significands(int exponent, int64_t cols) {
  std::vector<bf16> x(static_cast<size_t>(128 * cols), bf16{0});
  for (int64_t top = 0; top < 128; ++top) {
    const auto amax = static_cast<uint16_t>((127 + exponent) << 7 | top);
    int64_t next = 0;
    for (int64_t i = 0; i < cols; ++i) {
      const int64_t bits = amax - next;
      if (i % 128 == 0)
        x[size_t(top * cols + i)] = bf16{amax};
      else if (bits > 0)
        x[size_t(top * cols + i)] =
            bf16{static_cast<uint16_t>(bits | (next++ % 3 == 1 ? 0x8000 : 0))};
    }
  }
  return x;
}

TEST(Fp8Codes, EveryPairOfSignificandsHasTheReferencesCode) {
  const int64_t cols = 24 * 128;
  // The largest value near 1, below the least scale's, and far out.
  for (const int exponent : {0, -14, -16, 60, -90}) {
    const auto h = all_significands(exponent, cols);
    std::vector<float> x;
    for (const bf16 v : h) x.push_back(spec::to_float(v));
    std::vector<f8e4m3> want(x.size()), got(x.size());
    for (const bool weight : {false, true})
      for (const ActScale scale : {ActScale::fp32, ActScale::ue8m0}) {
        // Weights: every row is a block-row of its own.
        const int64_t rows = weight ? 1 : 128, times = 128 / rows;
        for (int64_t t = 0; t < times; ++t) {
          const size_t at = size_t(t * cols);
          std::vector<float> sw(size_t(rows * cols / 128)), sg(sw.size());
          if (weight)
            ref::fp8_quantize_weight<float>(rows, cols, x.data() + at, want.data() + at, sw.data());
          else
            ref::fp8_quantize_act<float>(rows, cols, x.data() + at, want.data() + at, sw.data(),
                                         scale);
          kern::fp8_quant_cpu_simd(
              {rows, cols, weight, scale, DType::bf16, h.data() + at, got.data() + at, sg.data()});
          ASSERT_EQ(sg, sw) << exponent;
        }
        for (size_t i = 0; i < x.size(); ++i)
          ASSERT_EQ(got[i].bits, want[i].bits) << exponent << " " << weight << " " << i;
      }
  }
}

TEST(Fp8Codes, BlocksThatAreNotFiniteAreAlikeAtAllLevels) {
  const int64_t rows = 5, cols = 1024;
  std::vector<bf16> h;
  for (const float v : normals<float>(rows * cols, 5)) h.push_back(spec::to_bf16(v));
  h[130] = bf16{0x7fc0}, h[cols + 1000] = bf16{0xff80}, h[4 * cols] = bf16{0x7f80};
  for (const bool weight : {false, true}) {
    const auto quantised = [&](kern::Isa level) {
      const kern::IsaCap cap(level);
      std::vector<f8e4m3> codes(h.size());
      std::vector<float> scales(size_t(weight ? cols / 128 : rows * cols / 128));
      kern::fp8_quant_cpu_simd(
          {rows, cols, weight, ActScale::fp32, DType::bf16, h.data(), codes.data(), scales.data()});
      std::vector<uint32_t> bits;
      for (const auto c : codes) bits.push_back(c.bits);
      for (const float s : scales) bits.push_back(std::bit_cast<uint32_t>(s));
      return bits;
    };
    const auto plain = quantised(kern::Isa::avx2);
    EXPECT_EQ(quantised(kern::Isa::avx512), plain);
    EXPECT_EQ(quantised(kern::Isa::avx512_bf16), plain);
  }
}

std::vector<bf16> rounded(const std::vector<float>& v) {
  std::vector<bf16> h;
  for (const float f : v) h.push_back(spec::to_bf16(f));
  return h;
}
bool same_bits(const auto& a, const auto& b) {
  return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(a[0])) == 0;
}

TEST(Fp8Codes, FusedNormAndSwigluHaveTheBitsOfTheTwoSteps) {
  const int64_t T = 5;
  for (const kern::Isa level : {kern::Isa::avx2, kern::Isa::avx512, kern::Isa::avx512_bf16})
    for (const int64_t n : {7168, 1500, 128, 77})
      for (const ActScale kind : {ActScale::fp32, ActScale::ue8m0}) {
        const kern::IsaCap cap(level);
        const size_t size = size_t(T * n), blocks = size_t(T * fp8_blocks(n));
        const auto x = rounded(normals<float>(2 * T * n, 3)), w = rounded(normals<float>(n, 4)),
                   r = rounded(normals<float>(T * n, 5));
        std::vector<bf16> y(size), y2(size), r1(size), r2(size);
        std::vector<f8e4m3> want(size), got(size);
        std::vector<float> ws(blocks), gs(blocks);
        const kern::QuantOut out{got.data(), gs.data(), kind};
        const auto compare = [&](const char* what) {
          kern::fp8_quant_cpu_simd(
              {T, n, false, kind, DType::bf16, y.data(), want.data(), ws.data()});
          EXPECT_TRUE(same_bits(gs, ws) && same_bits(got, want) && same_bits(y, y2))
              << what << " " << n;
        };
        spec::RmsNormArgs a{T,           n,        1e-6,      spec::NormRounding::single,
                            DType::bf16, x.data(), r1.data(), w.data(),
                            y.data()};
        kern::rmsnorm_cpu_simd(a, r.data());
        a.residual = r2.data(), a.y = y2.data();
        kern::rmsnorm_quant_cpu_simd(a, r.data(), out);
        compare("rmsnorm");
        EXPECT_TRUE(same_bits(r1, r2));
        a.residual = nullptr, a.y = y.data();
        kern::rmsnorm_cpu_simd(a);
        a.y = nullptr;
        kern::rmsnorm_quant_cpu_simd(a, nullptr, out);
        y2 = y;
        compare("rmsnorm without a residual");
        const std::vector<float> scale{0.5F, -2, 1, 3, 0};
        for (const float* row_scale : {static_cast<const float*>(nullptr), scale.data()}) {
          spec::SwigluArgs s{
              T,        n, DType::bf16, DType::bf16, x.data(), x.data() + n, 2 * n, row_scale,
              y.data(), n};
          kern::swiglu_cpu_simd(s);
          s.y = y2.data();
          kern::swiglu_quant_cpu_simd(s, out);
          compare("swiglu");
        }
      }
}

}  // namespace
}  // namespace v3b
