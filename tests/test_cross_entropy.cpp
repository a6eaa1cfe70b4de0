// LM head, cross-entropy and perplexity (SPEC 1.29, 3.8): identities, finite differences, kernels
// against the reference.
#include <gtest/gtest.h>

#include <cmath>
#include <numeric>
#include <random>
#include <vector>

#include "kernels/gemm/gemm.h"
#include "kernels/gemm/lm_head_ce.h"
#include "model/error.h"
#include "reference/cross_entropy.h"
#include "reference/gemm.h"
#include "reference/perplexity.h"
#include "tests/normals.h"

namespace v3b {
namespace {

using spec::bf16;
using spec::DType;
using spec::PplDef;

TEST(CrossEntropy, KnownValues) {
  const std::vector<double> z = {0.0, std::log(2.0), std::log(5.0)};  // p = 1/8, 2/8, 5/8
  const int64_t label = 1;
  double nll = 0, lse = 0;
  const auto sum = ref::cross_entropy<double>(1, 3, z.data(), &label, &nll, &lse);
  EXPECT_NEAR(nll, std::log(4.0), 1e-15);
  EXPECT_NEAR(lse, std::log(8.0), 1e-15);
  EXPECT_NEAR(sum.mean(), std::log(4.0), 1e-15);
}

TEST(CrossEntropy, IgnoredLabelsCountForNothing) {
  const int64_t kV = 11;
  const auto z = normals(4 * kV, 1);
  const std::vector<int64_t> labels = {3, spec::kIgnoreLabel, 10, spec::kIgnoreLabel};
  std::vector<double> nll(4), dz(4 * kV);
  const auto sum = ref::cross_entropy<double>(4, kV, z.data(), labels.data(), nll.data(), nullptr);
  EXPECT_EQ(sum.valid, 2);
  EXPECT_EQ(nll[1], 0.0);
  EXPECT_DOUBLE_EQ(sum.mean(), (nll[0] + nll[2]) / 2);
  ref::cross_entropy_backward<double>(4, kV, z.data(), labels.data(), 0.5, dz.data());
  for (int64_t v = 0; v < kV; ++v) EXPECT_EQ(dz[kV + v], 0.0);
}

TEST(CrossEntropy, ChunkedOnlineLseIsTheSameForEveryChunk) {
  auto z = normals(1000, 2, 30.0);
  z[5] = -INFINITY;
  const double want = ref::logsumexp<double>(1000, z.data());
  for (const int64_t chunk : {1, 7, 64, 999, 1000, 4096}) {
    EXPECT_NEAR(ref::logsumexp_chunked<double>(1000, chunk, z.data()), want,
                1e-12 * std::abs(want));
  }
  const std::vector<double> big(10, 1e300);  // no overflow
  EXPECT_NEAR(ref::logsumexp<double>(10, big.data()) / 1e300, 1.0, 1e-15);
}

TEST(CrossEntropy, BackwardIsTheCentralDifference) {
  constexpr int64_t kT = 3, kV = 13;
  const auto z = normals(kT * kV, 3, 2.0);
  const std::vector<int64_t> labels = {4, spec::kIgnoreLabel, 0};
  std::vector<double> dz(kT * kV);
  ref::cross_entropy_backward<double>(kT, kV, z.data(), labels.data(), 0.5, dz.data());
  for (int64_t i = 0; i < kT * kV; ++i) {
    auto hi = z, lo = z;
    hi[i] += 1e-6, lo[i] -= 1e-6;
    const auto loss = [&](const std::vector<double>& x) {
      return ref::cross_entropy<double>(kT, kV, x.data(), labels.data(), nullptr, nullptr).mean();
    };
    EXPECT_NEAR(dz[i], (loss(hi) - loss(lo)) / 2e-6, 1e-6 * 1 + 1e-8);
  }
  for (const int64_t t : {0, 2}) {  // rows sum to zero
    EXPECT_NEAR(std::accumulate(dz.begin() + t * kV, dz.begin() + (t + 1) * kV, 0.0), 0.0, 1e-15);
  }
}

TEST(CrossEntropy, LmHeadInChunksEqualsWholeLogits) {
  constexpr int64_t kT = 6, kD = 20, kV = 101;
  const auto h = normals(kT * kD, 4), w = normals(kV * kD, 5);
  const std::vector<int64_t> labels = {0, 100, 50, spec::kIgnoreLabel, 7, 7};
  std::vector<double> z(kT * kV), nll(kT), lse(kT), nll2(kT), lse2(kT);
  ref::linear<double>(kT, kD, kV, h.data(), w.data(), z.data());
  ref::cross_entropy<double>(kT, kV, z.data(), labels.data(), nll.data(), lse.data());
  for (const int64_t chunk : {0, 1, 10, 64, 101}) {
    std::vector<int32_t> argmax(kT, -1);
    ref::lm_head_ce<double>(kT, kD, kV, h.data(), w.data(), labels.data(), nll2.data(), lse2.data(),
                            argmax.data(), chunk);
    for (int64_t t = 0; t < kT; ++t) {
      EXPECT_NEAR(nll2[t], nll[t], 1e-12);
      EXPECT_NEAR(lse2[t], lse[t], 1e-12);
      const auto* row = z.data() + t * kV;
      EXPECT_EQ(argmax[t], std::max_element(row, row + kV) - row);
    }
  }
}

// ---- perplexity
// ----------------------------------------------------------------------------------------

// A made-up model whose loss depends on the token and on how much context it sees.
double loss_of(int64_t token, int64_t context) {
  return 2.0 + std::sin(static_cast<double>(token)) + 3.0 / (1.0 + static_cast<double>(context));
}
std::vector<double> made_up(int64_t begin, int64_t end) {
  std::vector<double> v;
  for (int64_t i = begin; i < end; ++i) v.push_back(loss_of(i, i - begin));
  return v;
}

TEST(Perplexity, EveryTokenIsScoredOnce) {
  for (const auto& [n, w, s] :
       {std::array<int64_t, 3>{1000, 64, 16}, {1000, 64, 64}, {63, 64, 8}, {65, 64, 1}}) {
    int64_t next = 0;
    for (const auto& win : ref::ppl_windows(n, w, s)) {
      EXPECT_EQ(win.first_scored, next);
      EXPECT_LE(win.end - win.begin, w);
      EXPECT_LT(win.first_scored, win.end);
      EXPECT_EQ(win.begin % s, 0);
      next = win.end;
    }
    EXPECT_EQ(next, n);
  }
  EXPECT_TRUE(ref::ppl_windows(0, 8, 4).empty());
  EXPECT_THROW(ref::ppl_windows(10, 4, 5), Error);
  EXPECT_THROW(ref::ppl_windows(10, 4, 0), Error);
}

TEST(Perplexity, StrideEqualToWindowIsIndependentChunks) {
  constexpr int64_t kN = 1000, kW = 128;
  const auto r = ref::sliding_perplexity(kN, kW, kW, made_up);
  double sum = 0, means = 0;
  int64_t chunks = 0;
  for (int64_t b = 0; b < kN; b += kW, ++chunks) {
    double s = 0;
    for (const double x : made_up(b, std::min(b + kW, kN))) s += x;
    sum += s, means += s / static_cast<double>(std::min(kW, kN - b));
  }
  EXPECT_EQ(r.windows, chunks);
  EXPECT_NEAR(r.token_mean_nll, sum / kN, 1e-12);
  EXPECT_NEAR(r.window_mean_nll, means / static_cast<double>(chunks), 1e-12);
  EXPECT_GT(std::abs(r.token_mean_nll - r.window_mean_nll), 1e-6);  // the two definitions differ
  EXPECT_DOUBLE_EQ(r.ppl(PplDef::token_mean), std::exp(r.token_mean_nll));
  EXPECT_DOUBLE_EQ(r.ppl(PplDef::window_mean), std::exp(r.window_mean_nll));
}

TEST(Perplexity, OneWindowIsTheWholeDocumentForEveryStride) {
  constexpr int64_t kN = 300;
  double sum = 0;
  for (const double x : made_up(0, kN)) sum += x;
  for (const int64_t w : {300, 301, 4096}) {
    for (const int64_t s : {1, 7, 299, 300}) {
      const auto r = ref::sliding_perplexity(kN, w, s, made_up);
      EXPECT_EQ(r.windows, 1);
      EXPECT_NEAR(r.token_mean_nll, sum / kN, 1e-12);
      EXPECT_NEAR(r.window_mean_nll, sum / kN, 1e-12);
    }
  }
}

TEST(Perplexity, StrideOneGivesFullContextToEveryLaterToken) {
  constexpr int64_t kN = 200, kW = 32;
  std::vector<int64_t> context(kN, -1);
  for (const auto& w : ref::ppl_windows(kN, kW, 1))
    for (int64_t i = w.first_scored; i < w.end; ++i) context[i] = i - w.begin;
  for (int64_t i = 0; i < kN; ++i) EXPECT_EQ(context[i], i < kW ? i : kW - 1);
}

TEST(Perplexity, UniformModelHasPerplexityV) {
  constexpr double kV = 4096;
  const auto uniform = [](int64_t b, int64_t e) {
    return std::vector<double>(e - b, std::log(kV));
  };
  for (const int64_t s : {1, 16, 64}) {
    const auto r = ref::sliding_perplexity(500, 64, s, uniform);
    EXPECT_NEAR(r.ppl(PplDef::token_mean), kV, 1e-9 * kV);
    EXPECT_NEAR(r.ppl(PplDef::window_mean), kV, 1e-9 * kV);
    EXPECT_NEAR(r.bits_per_token(), 12.0, 1e-12);
    EXPECT_NEAR(r.bits_per_byte(2000), 12.0 * 500 / 2000, 1e-12);
  }
  // and a model whose logits are all equal
  const std::vector<float> z(4096, 0.25F);
  const int64_t label = 17;
  float nll = 0, lse = 0;
  kern::cross_entropy_rows(1, 4096, z.data(), 4096, &label, &nll, &lse, nullptr);
  EXPECT_NEAR(std::exp(nll), kV, 1e-5 * kV);
}

// ---- kernels
// -------------------------------------------------------------------------------------------

TEST(LmHeadKernel, EqualsTheReference) {
  const int64_t shapes[][3] = {
      {1, 16, 33}, {7, 64, 1000}, {300, 32, 4099}, {2, 128, 270000}, {40, 256, 80}};
  for (const auto& s : shapes) {
    const int64_t t = s[0], d = s[1], v = s[2];
    for (const DType dtype : {DType::f32, DType::bf16}) {
      SCOPED_TRACE("T" + std::to_string(t) + " V" + std::to_string(v) + " " +
                   spec::dtype_name(dtype));
      std::mt19937_64 rng(t);
      std::normal_distribution<float> normal;
      std::vector<float> hf(t * d), wf(v * d);
      for (float& x : hf) x = normal(rng);
      for (float& x : wf) x = normal(rng) * 0.3F;
      std::vector<bf16> hh(hf.size()), wh(wf.size());
      if (dtype == DType::bf16) {
        for (size_t i = 0; i < hf.size(); ++i)
          hh[i] = spec::to_bf16(hf[i]), hf[i] = spec::to_float(hh[i]);
        for (size_t i = 0; i < wf.size(); ++i)
          wh[i] = spec::to_bf16(wf[i]), wf[i] = spec::to_float(wh[i]);
      }
      std::vector<int64_t> labels(t);
      for (auto& l : labels) l = static_cast<int64_t>(rng() % v);
      if (t > 2) labels[1] = spec::kIgnoreLabel, labels[2] = v - 1;
      std::vector<float> nll(t, NAN), lse(t, NAN);
      std::vector<int32_t> argmax(t, -1);
      const bool h16 = dtype == DType::bf16;
      kern::lm_head_ce_cpu_simd({t, d, v, dtype,
                                 h16 ? static_cast<const void*>(hh.data()) : hf.data(),
                                 h16 ? static_cast<const void*>(wh.data()) : wf.data(),
                                 labels.data(), nll.data(), lse.data(), argmax.data()});
      std::vector<double> hd(hf.begin(), hf.end()), wd(wf.begin(), wf.end()), nll64(t), lse64(t);
      std::vector<int32_t> arg64(t);
      ref::lm_head_ce<double>(t, d, v, hd.data(), wd.data(), labels.data(), nll64.data(),
                              lse64.data(), arg64.data(), 8192);
      for (int64_t i = 0; i < t; ++i) {  // both are sums in fp32 of exact products
        ASSERT_NEAR(lse[i], lse64[i], 1e-5 * std::max(1.0, std::abs(lse64[i])));
        ASSERT_NEAR(nll[i], nll64[i], 1e-5 * std::max(1.0, std::abs(lse64[i])));
        ASSERT_EQ(argmax[i], arg64[i]);
      }
    }
  }
}

TEST(LmHeadKernel, TiesTakeTheLowestIndexAndNanIsNotHidden) {
  for (const int64_t v : {5, 40, 100}) {
    std::vector<float> z(2 * v, -1.0F);
    z[3] = z[4] = 2.0F, z[v - 1] = 2.0F;
    z[v + v - 1] = NAN;
    std::vector<float> lse(2);
    std::vector<int32_t> argmax(2);
    kern::cross_entropy_rows(2, v, z.data(), v, nullptr, nullptr, lse.data(), argmax.data());
    EXPECT_EQ(argmax[0], 3);
    EXPECT_TRUE(std::isfinite(lse[0]));
    EXPECT_TRUE(std::isnan(lse[1]));
    const std::vector<float> low(v, -INFINITY);
    kern::cross_entropy_rows(1, v, low.data(), v, nullptr, nullptr, lse.data(), nullptr);
    EXPECT_EQ(lse[0], -INFINITY);
  }
}

TEST(LmHeadKernel, BackwardRowsEqualTheReference) {
  constexpr int64_t kT = 33, kV = 517, kLd = 520;
  const auto zd = normals(kT * kV, 6, 3.0);
  std::vector<float> z(kT * kLd, NAN), lse(kT), nll(kT), dz(kT * kLd, 7.0F);
  std::vector<double> z64(kT * kV), want(kT * kV);
  std::vector<int64_t> labels(kT);
  for (int64_t t = 0; t < kT; ++t) {
    labels[t] = t % 5 == 0 ? spec::kIgnoreLabel : t * 7 % kV;
    for (int64_t v = 0; v < kV; ++v)
      z64[t * kV + v] = z[t * kLd + v] = static_cast<float>(zd[t * kV + v]);
  }
  kern::cross_entropy_rows(kT, kV, z.data(), kLd, labels.data(), nll.data(), lse.data(), nullptr);
  std::vector<bf16> half(kT * kV);
  kern::cross_entropy_backward_rows(kT, kV, z.data(), kLd, labels.data(), lse.data(), 0.125F,
                                    dz.data(), kLd, half.data());
  ref::cross_entropy_backward<double>(kT, kV, z64.data(), labels.data(), 0.125, want.data());
  for (int64_t t = 0; t < kT; ++t) {
    for (int64_t v = 0; v < kV; ++v) {
      ASSERT_NEAR(dz[t * kLd + v], want[t * kV + v], 1e-6 * 0.125);
      ASSERT_EQ(half[t * kV + v].bits, spec::to_bf16(dz[t * kLd + v]).bits);
    }
    for (int64_t v = kV; v < kLd; ++v) ASSERT_EQ(dz[t * kLd + v], 7.0F);  // pad untouched
  }
  // in place, and bf16 only
  kern::cross_entropy_backward_rows(kT, kV, z.data(), kLd, labels.data(), lse.data(), 0.125F,
                                    z.data(), kLd, nullptr);
  for (int64_t v = 0; v < kV; ++v) ASSERT_EQ(z[kLd + v], dz[kLd + v]);
}

}  // namespace
}  // namespace v3b
