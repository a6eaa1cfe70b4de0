// The pure parts of sampling and acceptance on the host: ordered keys, and top-p by counts run serially, against the
// sorted reference.
#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <vector>

#include "kernels/core/order_key.h"
#include "kernels/mtp/sampling.h"
#include "model/rng.h"
#include "reference/speculative.h"

namespace v3b::kern {
namespace {

TEST(OrderKey, OrdersAsFloatsDo) {
  const float inf = std::numeric_limits<float>::infinity();
  std::vector<float> v{-inf, -3e38f, -1.0f, -1e-45f, -0.0f, 0.0f, 1e-45f, 0.5f, 1.0f, 3e38f, inf};
  for (int i = 0; i < 200; ++i)
    v.push_back(static_cast<float>(model::rng_normal({3, 1}, uint64_t(i))));
  for (const float a : v)
    for (const float b : v) {
      EXPECT_EQ(order_key(a) < order_key(b), a < b) << a << " " << b;
      EXPECT_EQ(order_key(a) == order_key(b), a == b) << a << " " << b;
    }
  const float nan = std::numeric_limits<float>::quiet_NaN();
  EXPECT_LT(order_key(nan), order_key(-inf));
  EXPECT_LT(order_key(-nan), order_key(-inf));
  for (const float a : v) EXPECT_EQ(order_value(order_key(a)), a);
  EXPECT_EQ(order_value(order_key(nan)), -inf);
}
TEST(OrderKey, TiesGoToTheLowerIndex) {
  EXPECT_GT(pick_key(order_key(1.0f), 3), pick_key(order_key(1.0f), 4));
  EXPECT_GT(pick_key(order_key(1.5f), 900000), pick_key(order_key(1.0f), 0));
  EXPECT_GT(pick_key(order_key(-0.0f), 1), pick_key(order_key(0.0f), 2));
  EXPECT_EQ(pick_index(pick_key(order_key(-2.0f), 129279)), 129279);
  EXPECT_EQ(pick_value(pick_key(order_key(-2.0f), 129279)), -2.0f);
}

// The search as the kernel runs it, in order.
std::vector<double> top_p_by_counts(const std::vector<float>& weight, double top_p) {
  uint64_t total = 0;
  for (const float w : weight) total += sampling_mass(w);
  const uint64_t target = sampling_target(top_p, total);
  TopPSearch s;
  for (int round = 0; round < kTopPRounds; ++round) {
    std::vector<unsigned long long> mass(256, 0);
    for (const float w : weight) {
      const uint32_t bits = std::bit_cast<uint32_t>(w);
      if (top_p_candidate(s, round, bits))
        mass[size_t(top_p_digit(round, bits))] += sampling_mass(w);
    }
    // In two halves, as lanes of a warp take runs of buckets.
    unsigned long long upper = 0;
    for (int d = 255; d >= 128; --d) upper += mass[size_t(d)];
    const bool found = top_p_step(s, round, mass.data(), 255, 128, 0, target) ||
                       top_p_step(s, round, mass.data(), 127, 0, upper, target);
    EXPECT_TRUE(found) << round;
  }
  const TopPCut cut = top_p_cut(s, target);
  std::vector<double> p;
  int64_t ties = 0;
  for (const float w : weight) {
    const uint32_t bits = std::bit_cast<uint32_t>(w);
    const bool keep = bits > cut.threshold || (bits == cut.threshold && ties++ < cut.ties);
    p.push_back(keep ? w * cut.scale : 0.0);
  }
  return p;
}

TEST(Sampling, TopPByCountsIsTopPBySorting) {
  int kept_total = 0;
  for (uint64_t seed = 0; seed < 60; ++seed) {
    const int64_t V = 5 + int64_t(seed) * 37;
    const double spread = seed % 3 == 0 ? 0.1 : seed % 3 == 1 ? 2.0 : 9.0;
    const double top_p = seed % 4 == 0 ? 1e-9 : seed % 4 == 1 ? 0.5 : seed % 4 == 2 ? 0.95 : 0.9999;
    std::vector<float> z(static_cast<size_t>(V));
    for (size_t i = 0; i < z.size(); ++i) {
      z[i] = static_cast<float>(spread * model::rng_normal({seed, 9}, i));
      if (seed % 5 == 0) z[i] = std::round(z[i]);  // many equal weights
    }
    const float m = *std::max_element(z.begin(), z.end());
    std::vector<float> weight;
    for (const float v : z) weight.push_back(std::exp((v - m) / 0.8f));
    const std::vector<double> got = top_p_by_counts(weight, top_p),
                              want = ref::sampling_distribution(z, 0.8, top_p);
    for (size_t i = 0; i < z.size(); ++i) {
      EXPECT_EQ(got[i] > 0, want[i] > 0) << "seed " << seed << " id " << i;
      EXPECT_NEAR(got[i], want[i], 2e-6 * want[i]) << "seed " << seed << " id " << i;
      kept_total += want[i] > 0;
    }
  }
  EXPECT_GT(kept_total, 1000);
}
TEST(Sampling, TargetsStayInRange) {
  EXPECT_EQ(sampling_target(1e-300, 1000), 1u);
  EXPECT_EQ(sampling_target(1.0, 1000), 1000u);
  EXPECT_EQ(sampling_target(0.5, 1001), 501u);
  EXPECT_EQ(sampling_mass(1.0f), uint64_t{1} << 43);
  EXPECT_LE(double(kSamplingMaxVocab) * kSamplingUnit, 0x1p63);
}

TEST(Sampling, AcceptanceTest) {
  // V = 2, one draft of id 1: q(1) = 0.5, p(1) = 0.25, so it survives for u < 0.5.
  const std::vector<float> p{0.75f, 0.25f, 1.0f, 0.0f}, q{0.5f, 0.5f}, zero{1.0f, 0.0f};
  const int32_t draft = 1;
  for (const double u : {0.0, 0.499999, 0.5, 0.9}) {
    const double uniform[2] = {u, 0};
    spec::MtpAcceptArgs a = {1, 1, 2, false, p.data(), q.data(), &draft, uniform, nullptr, nullptr};
    EXPECT_EQ(accepted_drafts(a, 0), u < 0.5);
    a.q = nullptr;  // one-hot: u < p
    EXPECT_EQ(accepted_drafts(a, 0), u < 0.25);
    a.q = zero.data();  // cannot have been drawn
    EXPECT_EQ(accepted_drafts(a, 0), 0);
  }
  EXPECT_EQ(residual_weight(0.75f, q.data(), 0, -1), 0.25);
  EXPECT_EQ(residual_weight(0.25f, q.data(), 1, -1), 0.0);
  EXPECT_EQ(residual_weight(0.75f, nullptr, 0, 0), 0.0);
  EXPECT_EQ(residual_weight(0.75f, nullptr, 0, 1), 0.75);
}

}  // namespace
}  // namespace v3b::kern
