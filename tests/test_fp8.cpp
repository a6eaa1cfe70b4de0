// FP8: golden codes and scales of SPEC Appendix A, noise figures of 0.6, the emulated accumulator
// of 1.23, and the kernels against the reference.
#include <gtest/gtest.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <random>
#include <string>
#include <vector>

#include "kernels/core/cpu.h"
#include "kernels/gemm/fp8.h"
#include "reference/fp8_gemm.h"
#include "reference/fp8_quant.h"
#include "reference/gemm.h"
#include "tests/normals.h"
#include "tests/worst.h"

namespace v3b {
namespace {

using spec::ActScale;
using spec::bf16;
using spec::DType;
using spec::f8e4m3;
using spec::fp8_blocks;

template <class A, class B>
double rel_error(const std::vector<A>& got, const std::vector<B>& want) {
  double d = 0, n = 0;
  for (size_t i = 0; i < want.size(); ++i) {
    d += (double(got[i]) - double(want[i])) * (double(got[i]) - double(want[i]));
    n += double(want[i]) * double(want[i]);
  }
  return std::sqrt(d / n);
}

TEST(Fp8, GoldenCodes) {
  const struct {
    float x;
    int code;
    float value;
  } golden[] = {{0.3F, 0x2A, 0.3125F},       {1.0F, 0x38, 1.0F},           {1.0625F, 0x38, 1.0F},
                {1.1875F, 0x3A, 1.25F},      {17.0F, 0x58, 16.0F},         {19.0F, 0x5A, 20.0F},
                {240.0F, 0x77, 240.0F},      {447.0F, 0x7E, 448.0F},       {448.0F, 0x7E, 448.0F},
                {460.0F, 0x7E, 448.0F},      {0.001F, 0x01, 0x1p-9F},      {0x1p-10F, 0x00, 0.0F},
                {0x1.8p-10F, 0x01, 0x1p-9F}, {0.0146F, 0x07, 0.013671875F}};
  for (const auto& g : golden) {
    EXPECT_EQ(spec::to_f8e4m3(g.x).bits, g.code) << g.x;
    EXPECT_EQ(spec::to_f8e4m3(-g.x).bits, g.code | 0x80) << -g.x;
    EXPECT_EQ(spec::to_float(spec::to_f8e4m3(g.x)), g.value);
  }
  EXPECT_EQ(spec::to_f8e4m3(NAN).bits, 0x7F);
  EXPECT_EQ(spec::to_f8e4m3(INFINITY).bits, 0x7E);
  EXPECT_TRUE(std::isnan(spec::to_float(f8e4m3{0xFF})));
  for (int c = 0; c < 256; ++c) {  // every code is a fixed point
    if ((c & 0x7f) == 0x7f) continue;
    EXPECT_EQ(spec::to_f8e4m3(spec::to_float(f8e4m3{static_cast<uint8_t>(c)})).bits, c);
  }
}

// Nearest representable value, ties to the even code, for a dense sweep: an independent way to
// round.
TEST(Fp8, RoundingIsNearestEven) {
  std::vector<double> v(127);
  for (int c = 0; c < 127; ++c) v[c] = spec::to_float(f8e4m3{static_cast<uint8_t>(c)});
  for (double x = 0; x < 460; x = x * 1.0007 + 1.3e-5) {
    const auto xf = static_cast<float>(x);
    const auto hi = std::lower_bound(v.begin(), v.end(), double(xf)) - v.begin();
    int want = 126;
    if (hi < 127) {
      want = static_cast<int>(hi);
      if (hi > 0) {
        const double up = v[hi] - xf, down = xf - v[hi - 1];
        if (down < up || (down == up && hi % 2 == 1)) want = static_cast<int>(hi) - 1;
      }
    }
    ASSERT_EQ(spec::to_f8e4m3(xf).bits, want) << xf;
  }
}

TEST(Fp8, GoldenScales) {
  EXPECT_NEAR(ref::fp8_act_scale(3.7F, ActScale::fp32), 8.258928571e-3, 1e-10);
  EXPECT_EQ(ref::fp8_act_scale(3.7F, ActScale::ue8m0), 0x1p-6F);
  EXPECT_EQ(ref::fp8_act_scale(448.0F, ActScale::fp32), 1.0F);
  EXPECT_EQ(ref::fp8_act_scale(448.0F, ActScale::ue8m0), 1.0F);
  EXPECT_EQ(ref::fp8_act_scale(0.875F, ActScale::fp32), 0x1p-9F);
  EXPECT_EQ(ref::fp8_act_scale(0.875F, ActScale::ue8m0), 0x1p-9F);
  EXPECT_NEAR(ref::fp8_act_scale(1e-6F, ActScale::fp32), 2.232142857e-7, 1e-15);
  EXPECT_EQ(ref::fp8_act_scale(1e-6F, ActScale::ue8m0), 0x1p-22F);
  EXPECT_NEAR(0x1p-22, 2.384185791e-7, 1e-15);
}

TEST(Fp8, PowerOfTwoScaleIsTheNextOne) {
  std::mt19937_64 rng(2);
  for (int i = 0; i < 10000; ++i) {
    const float amax = std::exp2(static_cast<float>(rng() % 4000) / 100.0F - 13.0F);
    const float s = ref::fp8_act_scale(amax, ActScale::fp32),
                p = ref::fp8_act_scale(amax, ActScale::ue8m0);
    int exponent = 0;
    ASSERT_EQ(std::frexp(p, &exponent), 0.5F);  // a power of two
    ASSERT_TRUE(p >= s && p < 2 * s) << amax;
  }
}

// SPEC 1.22: published kernels multiply by 1/s or 448/a instead of dividing; at most 0.1% of the
// codes differ, by one step.
TEST(Fp8, ReciprocalVariantsDifferInFewCodesByOneStep) {
  constexpr int64_t kR = 512, kC = 1024;
  const auto x = normals<float>(kR * kC, 21);
  std::vector<f8e4m3> q(kR * kC);
  std::vector<float> s(kR * kC / 128);
  ref::fp8_quantize_act<float>(kR, kC, x.data(), q.data(), s.data());
  for (const bool of_amax : {false, true}) {
    int64_t differ = 0;
    for (int64_t i = 0; i < kR * kC; ++i) {
      const float factor = of_amax ? 448.0F / (s[i / 128] * 448.0F) : 1.0F / s[i / 128];
      const int code = spec::to_f8e4m3(x[i] * factor).bits;
      ASSERT_LE(std::abs(code - q[i].bits), 1);
      differ += code != q[i].bits;
    }
    EXPECT_LE(static_cast<double>(differ), 1e-3 * kR * kC) << differ;
  }
}

// SPEC 1.23: (dot * sa) * sb and dot * (sa * sb). SPEC says one ulp; 0.4% of random triples differ
// by two.
TEST(Fp8, ScaleOrder) {
  std::mt19937_64 rng(4);
  std::uniform_real_distribution<float> u(0.5F, 2.0F);
  for (int i = 0; i < 100000; ++i) {
    const float dot = u(rng), sa = u(rng), sb = u(rng);
    const float x = (dot * sa) * sb, y = dot * (sa * sb);
    const float ulp = std::nextafter(std::max(x, y), INFINITY) - std::max(x, y);
    ASSERT_LE(std::abs(x - y), 2 * ulp);
  }
}

TEST(Fp8, QuantisationNoise) {  // SPEC 0.6: 2.56e-2, 2.66e-2, 2.65e-2, products 3.5e-2
  constexpr int64_t kR = 256, kC = 1024;
  const auto x = normals<double>(kR * kC, 1), w = normals<double>(kR * kC, 2);
  std::vector<f8e4m3> qx(kR * kC), qw(kR * kC);
  std::vector<float> sx(kR * kC / 128), sw(fp8_blocks(kR) * fp8_blocks(kC));
  std::vector<double> back(kR * kC), wback(kR * kC);
  ref::fp8_quantize_act<double>(kR, kC, x.data(), qx.data(), sx.data(), ActScale::ue8m0);
  ref::fp8_dequantize_act<double>(kR, kC, qx.data(), sx.data(), back.data());
  EXPECT_NEAR(rel_error(back, x), 2.66e-2, 0.05e-2);
  ref::fp8_quantize_act<double>(kR, kC, x.data(), qx.data(), sx.data());
  ref::fp8_dequantize_act<double>(kR, kC, qx.data(), sx.data(), back.data());
  EXPECT_NEAR(rel_error(back, x), 2.56e-2, 0.05e-2);
  ref::fp8_quantize_weight<double>(kR, kC, w.data(), qw.data(), sw.data());
  ref::fp8_dequantize_weight<double>(kR, kC, qw.data(), sw.data(), wback.data());
  EXPECT_NEAR(rel_error(wback, w), 2.65e-2, 0.05e-2);
  std::vector<double> full(kR * kR), quant(kR * kR), scaled(kR * kR);
  ref::linear<double>(kR, kC, kR, x.data(), w.data(), full.data());
  ref::linear<double>(kR, kC, kR, back.data(), wback.data(), quant.data());
  ref::fp8_gemm<double>(kR, kR, kC, qx.data(), sx.data(), qw.data(), sw.data(), scaled.data());
  EXPECT_LE(rel_error(scaled, quant), 1e-6);  // scale order only: fp32 scales are multiplied first
  const double eps = rel_error(scaled, full);
  EXPECT_NEAR(eps, 3.7e-2, 0.3e-2);
  EXPECT_TRUE(eps <= 5e-2 && eps * eps / 2 < 1e-3);  // DeepGEMM's diff
}

TEST(Fp8, FineScalesHelpOnlyBeyondE4M3Range) {  // SPEC 1.22, outlier scenario
  constexpr int64_t kR = 16, kC = 2048;
  const auto run = [&](double ratio) {
    auto x = normals<double>(kR * kC, 5);
    for (int64_t r = 0; r < kR; ++r) x[r * kC + 7] = ratio;  // one outlier channel
    std::vector<f8e4m3> q(kR * kC);
    std::vector<float> s(kR * kC / 128);
    std::vector<double> back(kR * kC), tensor(kR * kC), small, small_fine, small_tensor;
    ref::fp8_quantize_act<double>(kR, kC, x.data(), q.data(), s.data());
    ref::fp8_dequantize_act<double>(kR, kC, q.data(), s.data(), back.data());
    const float st = ref::fp8_quantize_tensor<double>(kR * kC, x.data(), q.data());
    for (int64_t i = 0; i < kR * kC; ++i) tensor[i] = double(spec::to_float(q[i])) * st;
    for (int64_t i = 0; i < kR * kC; ++i) {
      if (i % kC < 128) continue;  // the outlier's own block
      small.push_back(x[i]), small_fine.push_back(back[i]), small_tensor.push_back(tensor[i]);
    }
    return std::pair(rel_error(small_fine, small), rel_error(small_tensor, small));
  };
  const auto [fine3, tensor3] = run(1e3);
  EXPECT_LT(tensor3, 1.2 * fine3);  // floating point codes span it
  const auto [fine6, tensor6] = run(1e6);
  EXPECT_NEAR(fine6, 2.56e-2, 0.1e-2);
  EXPECT_GT(tensor6, 10 * fine6);
}

TEST(Fp8, HopperAccumulator) {
  constexpr int64_t kM = 8, kN = 48, kK = 4096;
  const auto x = normals<float>(kM * kK, 3), w = normals<float>(kN * kK, 4);
  std::vector<f8e4m3> qx(kM * kK), qw(kN * kK);
  std::vector<float> sx(kM * kK / 128), sw(kK / 128);
  ref::fp8_quantize_act<float>(kM, kK, x.data(), qx.data(), sx.data());
  ref::fp8_quantize_weight<float>(kN, kK, w.data(), qw.data(), sw.data());
  std::vector<double> exact(kM * kN);
  ref::fp8_gemm<double>(kM, kN, kK, qx.data(), sx.data(), qw.data(), sw.data(), exact.data());
  double worst = 0;  // largest relative error among elements above half the rms
  const auto error = [&](ref::HopperAccumulator acc) {
    std::vector<float> c(kM * kN);
    ref::fp8_gemm_hopper(kM, kN, kK, qx.data(), sx.data(), qw.data(), sw.data(), c.data(), acc);
    double rms = 0;
    for (const double v : exact) rms += v * v / static_cast<double>(exact.size());
    worst = 0;
    for (size_t i = 0; i < c.size(); ++i)
      if (exact[i] * exact[i] > rms / 4) worst = worse(worst, std::abs(c[i] / exact[i] - 1.0));
    return rel_error(c, exact);
  };
  const double e128 = error({128, 14}), worst128 = worst, e512 = error({512, 14}),
               whole = error({0, 14});
  const double worst_whole = worst;
  std::printf("largest relative error: 128 %.3e, K=4096 %.3e\n", worst128, worst_whole);
  EXPECT_TRUE(worst_whole <= 2e-2 &&
              worst_whole > 4 * worst128);  // up to ~2% without promotion [TR]
  RecordProperty("e128", std::to_string(e128));
  std::printf("hopper accumulator: eps 128 %.3e, 512 %.3e, K=4096 %.3e\n", e128, e512, whole);
  EXPECT_TRUE(e128 <= 6e-3);  // SPEC 0.6, Hopper tensor core
  EXPECT_LT(e128, e512);
  EXPECT_LT(e512, whole);
  EXPECT_TRUE(whole <= 2e-2);
  EXPECT_TRUE(error({128, 40}) <= 1e-6);  // a long accumulator has no such error
}

TEST(Fp8, RaggedWeightBlocks) {  // kv_a: 576 rows are 5 row blocks, the last of 64 rows
  constexpr int64_t kR = 576, kC = 200;
  EXPECT_EQ(fp8_blocks(kR), 5);
  const auto w = normals<double>(kR * kC, 8);
  std::vector<f8e4m3> q(kR * kC);
  std::vector<float> s(5 * 2);
  ref::fp8_quantize_weight<double>(kR, kC, w.data(), q.data(), s.data());
  double amax = 0;
  for (int64_t r = 512; r < kR; ++r)
    for (int64_t c = 128; c < kC; ++c) amax = std::max(amax, std::abs(w[r * kC + c]));
  EXPECT_EQ(s[4 * 2 + 1], static_cast<float>(amax) / 448.0F);
  const std::vector<double> zeros(kR * kC, 0.0);
  ref::fp8_quantize_weight<double>(kR, kC, zeros.data(), q.data(), s.data());
  for (const f8e4m3 c : q) ASSERT_EQ(c.bits, 0);
  for (const float v : s) ASSERT_EQ(v, 1.0F);
}

// ---- kernels
// -------------------------------------------------------------------------------------------

TEST(Fp8Kernel, QuantisationIsBitExact) {
  for (const bool weight : {false, true}) {
    for (const DType dtype : {DType::f32, DType::bf16}) {
      for (const ActScale scale : {ActScale::fp32, ActScale::ue8m0}) {
        for (const auto& [rows, cols] :
             {std::pair<int64_t, int64_t>{1, 128}, {3, 77}, {130, 300}, {257, 1024}}) {
          auto x = normals<float>(rows * cols, 11);
          for (size_t i = 0; i < x.size(); i += 97) x[i] *= 1e-4F;
          if (x.size() > 50) x[40] = 0, x[41] = -0.0F, x[42] = 3e4F;
          std::vector<bf16> h(x.size());
          if (dtype == DType::bf16)
            for (size_t i = 0; i < x.size(); ++i)
              h[i] = spec::to_bf16(x[i]), x[i] = spec::to_float(h[i]);
          const int64_t ns = (weight ? fp8_blocks(rows) : rows) * fp8_blocks(cols);
          std::vector<f8e4m3> want(x.size()), got(x.size(), f8e4m3{0x7f});
          std::vector<float> sw(ns), sg(ns, NAN);
          if (weight) {
            ref::fp8_quantize_weight<float>(rows, cols, x.data(), want.data(), sw.data());
          } else {
            ref::fp8_quantize_act<float>(rows, cols, x.data(), want.data(), sw.data(), scale);
          }
          kern::fp8_quant_cpu_simd(
              {rows, cols, weight, scale, dtype,
               dtype == DType::bf16 ? static_cast<const void*>(h.data()) : x.data(), got.data(),
               sg.data()});
          ASSERT_EQ(sg, sw);
          for (size_t i = 0; i < x.size(); ++i)
            ASSERT_EQ(got[i].bits, want[i].bits) << i << " " << x[i];
        }
      }
    }
  }
}

void check_gemm(void (*kernel)(const spec::Fp8GemmArgs&) noexcept) {
  const int64_t shapes[][3] = {{1, 1, 1},      {1, 130, 128},  {5, 64, 256},   {12, 63, 200},
                               {13, 200, 129}, {6, 257, 1000}, {40, 128, 384}, {130, 192, 77},
                               {400, 70, 260}, {37, 576, 512}};
  for (const auto& s : shapes) {
    const int64_t m = s[0], n = s[1], k = s[2], kb = fp8_blocks(k);
    for (const DType c_type : {DType::f32, DType::bf16}) {
      for (const bool exact : {true, false}) {
        SCOPED_TRACE("m" + std::to_string(m) + " n" + std::to_string(n) + " k" + std::to_string(k));
        std::mt19937_64 rng(m * 7 + n);
        std::vector<f8e4m3> qa(m * k), qb(n * k);
        std::vector<float> sa(m * kb), sb(fp8_blocks(n) * kb);
        if (exact) {  // integers and powers of two: every sum is exact in fp32
          for (auto& q : qa)
            q = spec::to_f8e4m3(static_cast<float>(static_cast<int>(rng() % 7) - 3));
          for (auto& q : qb)
            q = spec::to_f8e4m3(static_cast<float>(static_cast<int>(rng() % 7) - 3));
          for (auto& x : sa) x = std::ldexp(1.0F, static_cast<int>(rng() % 3) - 1);
          for (auto& x : sb) x = std::ldexp(1.0F, static_cast<int>(rng() % 3) - 1);
        } else {  // all codes but NaN, subnormals among them
          for (auto& q : qa) q.bits = static_cast<uint8_t>(rng() % 127 | (rng() & 0x80));
          for (auto& q : qb) q.bits = static_cast<uint8_t>(rng() % 127 | (rng() & 0x80));
          for (auto& x : sa) x = 1e-3F * static_cast<float>(rng() % 1000 + 1);
          for (auto& x : sb) x = 1e-3F * static_cast<float>(rng() % 1000 + 1);
        }
        std::vector<double> want(m * n), got(m * n);
        std::vector<float> cf(m * n, NAN);
        std::vector<bf16> ch(m * n, bf16{0x7fc0});
        void* c = c_type == DType::bf16 ? static_cast<void*>(ch.data()) : cf.data();
        kernel({m, n, k, qa.data(), sa.data(), qb.data(), sb.data(), c_type, c});
        ref::fp8_gemm<double>(m, n, k, qa.data(), sa.data(), qb.data(), sb.data(), want.data());
        for (int64_t i = 0; i < m * n; ++i) {
          got[i] = c_type == DType::bf16 ? spec::to_float(ch[i]) : cf[i];
          if (exact) {
            const auto w = static_cast<float>(want[i]);
            ASSERT_EQ(got[i], c_type == DType::bf16 ? spec::to_float(spec::to_bf16(w)) : w) << i;
          }
        }
        EXPECT_TRUE(rel_error(got, want) <= (c_type == DType::bf16 ? 3e-3 : 1e-5))
            << rel_error(got, want);
      }
    }
  }
  // A NaN code spoils its row or column and nothing else.
  for (const int64_t m : {3, 40}) {
    const int64_t n = 70, k = 150;
    std::vector<f8e4m3> qa(m * k, f8e4m3{0x38}), qb(n * k, f8e4m3{0x38});
    std::vector<float> sa(m * 2, 1.0F), sb(2, 1.0F), c(m * n);
    qa[1 * k + 149].bits = 0xff, qb[69 * k + 3].bits = 0x7f;
    kernel({m, n, k, qa.data(), sa.data(), qb.data(), sb.data(), DType::f32, c.data()});
    for (int64_t i = 0; i < m; ++i)
      for (int64_t j = 0; j < n; ++j)
        ASSERT_EQ(std::isnan(c[i * n + j]), i == 1 || j == 69) << i << "," << j;
  }
}

TEST(Fp8Kernel, GemmAtEveryLevel) {
  for (const auto level :
       {kern::Isa::avx2, kern::Isa::avx512, kern::Isa::avx512_bf16, kern::Isa::amx}) {
    if (level > kern::best_isa()) continue;
    SCOPED_TRACE(kern::isa_name(level));
    const kern::IsaCap cap(level);
    check_gemm(kern::fp8_gemm);
  }
}

TEST(Fp8Kernel, DequantisedWeightEqualsReference) {
  constexpr int64_t kR = 300, kC = 333;
  const auto w = normals<float>(kR * kC, 9);
  std::vector<f8e4m3> q(kR * kC);
  std::vector<float> s(fp8_blocks(kR) * fp8_blocks(kC)), want(kR * kC), got(kR * kC, NAN);
  std::vector<bf16> h(kR * kC);
  ref::fp8_quantize_weight<float>(kR, kC, w.data(), q.data(), s.data());
  ref::fp8_dequantize_weight<float>(kR, kC, q.data(), s.data(), want.data());
  kern::fp8_dequant_weight(kR, kC, q.data(), s.data(), DType::f32, got.data());
  EXPECT_EQ(got, want);
  kern::fp8_dequant_weight(kR, kC, q.data(), s.data(), DType::bf16, h.data());
  for (size_t i = 0; i < h.size(); ++i) ASSERT_EQ(h[i].bits, spec::to_bf16(want[i]).bits);
}

TEST(Fp8Kernel, LowerInstructionSets) {
  if (std::getenv("V3BENCH_MAX_ISA") != nullptr) GTEST_SKIP() << "already capped";
  char self[4096] = {};
  ASSERT_GT(readlink("/proc/self/exe", self, sizeof self - 1), 0);
  for (const std::string isa : {"avx2", "avx512"}) {
    const std::string cmd = "V3BENCH_MAX_ISA=" + isa + " '" + self +
                            "' --gtest_brief=1 --gtest_filter='Fp8Kernel.*' > /dev/null";
    EXPECT_EQ(std::system(cmd.c_str()), 0) << cmd;
  }
  if (kern::cpu_features().avx512_bf16 && !kern::cpu_features().amx_bf16) {  // AMX on arrays
    const std::string cmd = "V3BENCH_AMX=emulate '" + std::string(self) +
                            "' --gtest_brief=1 --gtest_filter='Fp8Kernel.Gemm*' > /dev/null";
    EXPECT_EQ(std::system(cmd.c_str()), 0) << cmd;
  }
}

}  // namespace
}  // namespace v3b
