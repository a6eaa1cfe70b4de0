// Routers: published example, identities of SPEC 1.11 and 1.12, backward of 3.6, and the kernel
// against the reference.
#include <gtest/gtest.h>
#include <omp.h>

#include <algorithm>
#include <cmath>
#include <functional>
#include <random>
#include <set>
#include <vector>

#include "kernels/moe/moe.h"
#include "reference/router.h"
#include "tests/normals.h"

namespace v3b {
namespace {

using ref::Routes;
using spec::RouterConfig;

RouterConfig v3_like(int64_t E, int64_t K, int64_t G, int64_t M) {
  return {.E = E, .K = K, .G = G, .M = M};
}
RouterConfig softmax_plain(int64_t E, int64_t K, bool norm, double c_r = 1.0) {
  return {.E = E,
          .K = K,
          .G = 1,
          .M = 1,
          .scoring = spec::Scoring::softmax,
          .group_rule = spec::GroupRule::none,
          .norm_topk_prob = norm,
          .c_r = c_r,
          .gate_eps = spec::GateEps::zero};
}

double logit(double s) { return std::log(s / (1 - s)); }
std::set<int32_t> chosen(const Routes<double>& r, int64_t t) {
  return {r.idx.begin() + t * r.K, r.idx.begin() + (t + 1) * r.K};
}

// ---- SPEC Appendix A ----

struct Example {
  std::vector<double> z, b{-.95, -.95, -.4, -.4, -.6, -.6, -.8, -.8};
  Example() {
    for (double s : {.9, .8, .1, .2, .85, .05, .3, .4}) z.push_back(logit(s));
  }
};

TEST(Router, PublishedExampleNegInfMask) {
  const Example x;
  const auto r = ref::route<double>(v3_like(8, 2, 4, 2), 1, x.z.data(), x.b.data());
  EXPECT_EQ(r.idx, (std::vector<int32_t>{4, 0}));
  EXPECT_NEAR(r.weight[0], 1.2142857, 5e-8);
  EXPECT_NEAR(r.weight[1], 1.2857143, 5e-8);
  EXPECT_NEAR(r.gap[0], 0.1, 1e-12);  // expert 0 (-.05) over expert 1 (-.15); groups -.3 over -.5
}

TEST(Router, PublishedExampleZeroMask) {
  const Example x;
  RouterConfig c = v3_like(8, 2, 4, 2);
  c.router_mask = spec::RouterMask::zero;
  const auto r = ref::route<double>(c, 1, x.z.data(), x.b.data());
  EXPECT_EQ(r.idx, (std::vector<int32_t>{4, 2}));  // a forbidden group's expert
  EXPECT_NEAR(r.weight[0], 2.2368421, 5e-8);
  EXPECT_NEAR(r.weight[1], 0.2631579, 5e-8);
}

// ---- identities ----

TEST(Router, SoftmaxTopkRenormEqualsSoftmaxOverTopk) {
  constexpr int64_t T = 50, E = 24, K = 5;
  const auto z = normals(T * E, 1, 2.0);
  const auto r = ref::route<double>(softmax_plain(E, K, true), T, z.data(), nullptr);
  for (int64_t t = 0; t < T; ++t) {
    double sum = 0;
    for (int64_t k = 0; k < K; ++k) sum += std::exp(z[t * E + r.idx[t * K + k]]);
    for (int64_t k = 0; k < K; ++k)
      EXPECT_NEAR(r.weight[t * K + k], std::exp(z[t * E + r.idx[t * K + k]]) / sum, 1e-12);
  }
}

TEST(Router, SwitchGateIsTheProbabilityItself) {
  const std::vector<double> z{0.5, 2.0, -1.0, 1.0};
  const auto r = ref::route<double>(softmax_plain(4, 1, true), 1, z.data(),
                                    nullptr);  // K = 1 never normalises
  double sum = 0;
  for (double v : z) sum += std::exp(v);
  EXPECT_EQ(r.idx[0], 1);
  EXPECT_NEAR(r.weight[0], std::exp(2.0) / sum, 1e-15);
}

// V2: group score is the best probability; c_r only without normalisation.
TEST(Router, V2GroupLimitedGreedy) {
  const std::vector<double> p{.30, .01, .20, .19, .02, .28};  // groups of two: .30, .20, .28
  std::vector<double> z;
  for (double v : p) z.push_back(std::log(v));
  RouterConfig c = softmax_plain(6, 2, false, 16.0);
  c.G = 3, c.M = 2, c.group_rule = spec::GroupRule::max, c.scale_only_if_unnormalised = true;
  c.router_mask = spec::RouterMask::zero;
  auto r = ref::route<double>(c, 1, z.data(), nullptr);
  EXPECT_EQ(r.idx, (std::vector<int32_t>{0, 5}));
  EXPECT_NEAR(r.weight[0], 16 * .30, 1e-12);
  EXPECT_NEAR(r.weight[1], 16 * .28, 1e-12);
  c.norm_topk_prob = true;
  r = ref::route<double>(c, 1, z.data(), nullptr);
  EXPECT_NEAR(r.weight[0] + r.weight[1], 1.0, 1e-12);
  c.group_rule = spec::GroupRule::top2_sum;  // the sums are .31, .39, .30: other groups
  EXPECT_EQ(ref::route<double>(c, 1, z.data(), nullptr).idx, (std::vector<int32_t>{0, 2}));
}

// The selection again, written by counting who beats whom.
std::set<int32_t> brute_force(const RouterConfig& c, const double* z, const double* b) {
  const int64_t size = c.E / c.G;
  std::vector<double> v(c.E), g(c.G);
  for (int64_t e = 0; e < c.E; ++e) v[e] = 1 / (1 + std::exp(-z[e])) + b[e];
  for (int64_t j = 0; j < c.G; ++j) {
    g[j] = -1e9;
    for (int64_t p = j * size; p < (j + 1) * size; ++p)
      for (int64_t q = p + 1; q < (j + 1) * size; ++q) g[j] = std::max(g[j], v[p] + v[q]);
  }
  std::set<int32_t> out;
  std::vector<int32_t> allowed;
  for (int64_t j = 0; j < c.G; ++j)
    if (std::count_if(g.begin(), g.end(), [&](double o) { return o > g[j]; }) < c.M)
      for (int64_t e = j * size; e < (j + 1) * size; ++e)
        allowed.push_back(static_cast<int32_t>(e));
  for (int32_t e : allowed)
    if (std::count_if(allowed.begin(), allowed.end(), [&](int32_t o) { return v[o] > v[e]; }) < c.K)
      out.insert(e);
  return out;
}

TEST(Router, SelectionGroupsAndWeightSum) {
  for (const RouterConfig& c :
       {v3_like(256, 8, 8, 4), v3_like(16, 4, 4, 2), v3_like(32, 6, 2, 1), v3_like(12, 3, 3, 2)}) {
    constexpr int64_t T = 60;
    const auto z = normals(T * c.E, 2), b = normals(c.E, 3, 0.2);
    const auto r = ref::route<double>(c, T, z.data(), b.data());
    for (int64_t t = 0; t < T; ++t) {
      EXPECT_EQ(chosen(r, t), brute_force(c, z.data() + t * c.E, b.data()));
      std::set<int64_t> groups;
      double sum = 0;
      for (int64_t k = 0; k < c.K; ++k) {
        const int32_t e = r.idx[t * c.K + k];
        groups.insert(e / (c.E / c.G));
        sum += r.weight[t * c.K + k];
        EXPECT_NEAR(r.scores[t * c.E + e], 1 / (1 + std::exp(-z[t * c.E + e])),
                    1e-15);  // without bias
      }
      EXPECT_LE(static_cast<int64_t>(groups.size()), c.M);
      EXPECT_NEAR(sum, c.c_r, 1e-12);
    }
  }
}

TEST(Router, BiasShiftInvariance) {
  constexpr int64_t T = 200;
  RouterConfig c = v3_like(32, 4, 4, 2);
  const auto z = normals(T * c.E, 4), b = normals(c.E, 5, 0.1);
  auto shifted = b;
  for (double& v : shifted) v -= 0.75;  // many sums below zero
  const auto same = [&] {
    const auto r = ref::route<double>(c, T, z.data(), b.data()),
               q = ref::route<double>(c, T, z.data(), shifted.data());
    int64_t equal = 0;
    for (int64_t t = 0; t < T; ++t) equal += chosen(r, t) == chosen(q, t);
    return equal;
  };
  EXPECT_EQ(same(), T);
  c.router_mask = spec::RouterMask::zero;
  EXPECT_LT(same(), T / 2);
}

TEST(Router, TiesGoToTheLowerIndex) {
  const std::vector<double> z(16, 0.25);
  const auto r = ref::route<double>(v3_like(16, 3, 4, 2), 1, z.data(), nullptr);
  EXPECT_EQ(r.idx, (std::vector<int32_t>{0, 1, 2}));
  EXPECT_EQ(r.gap[0], 0.0);
}

TEST(Router, GapIsTheDistanceToAnotherChoice) {
  constexpr int64_t T = 100;
  RouterConfig c = v3_like(16, 4, 1, 1);
  const auto z = normals(T * c.E, 6);
  const auto r = ref::route<double>(c, T, z.data(), nullptr);
  for (int64_t t = 0; t < T; ++t) {
    std::vector<double> b(c.E, 0.0);
    const int32_t last = r.idx[t * c.K + c.K - 1];
    b[last] = -0.999 * r.gap[t];
    EXPECT_EQ(chosen(ref::route<double>(c, 1, z.data() + t * c.E, b.data()), 0), chosen(r, t));
    b[last] = -1.001 * r.gap[t];
    EXPECT_NE(chosen(ref::route<double>(c, 1, z.data() + t * c.E, b.data()), 0), chosen(r, t));
  }
}

TEST(Router, NoEpsilonFlag) {
  RouterConfig c = v3_like(8, 2, 1, 1);
  const std::vector<double> z(8, -60.0);  // scores 8.8e-27: the epsilon 1e-20 dominates
  EXPECT_LT(ref::route<double>(c, 1, z.data(), nullptr).weight[0], 1e-4);
  c.gate_eps = spec::GateEps::zero;
  EXPECT_NEAR(ref::route<double>(c, 1, z.data(), nullptr).weight[0], 1.25, 1e-12);
}

// ---- backward, SPEC 3.6 ----

void check_backward(const RouterConfig& c, bool with_bias, bool extra) {
  constexpr int64_t T = 12;
  auto z = normals(T * c.E, 7);
  const auto bias = normals(c.E, 8, 0.1), up = normals(T * c.K, 9), up_s = normals(T * c.E, 10);
  const double* b = with_bias ? bias.data() : nullptr;
  const auto r = ref::route<double>(c, T, z.data(), b);
  std::vector<double> dz(T * c.E, std::nan(""));
  ref::route_backward<double>(c, r, up.data(), extra ? up_s.data() : nullptr, dz.data());
  // Loss = <up, weight> (+ <up_s, scores>). Weights are in selection order, which may change inside
  // the chosen set: take them by expert.
  const auto loss = [&] {
    const auto q = ref::route<double>(c, T, z.data(), b);
    double l = 0;
    for (int64_t t = 0; t < T; ++t)
      for (int64_t k = 0; k < c.K; ++k)
        for (int64_t j = 0; j < c.K; ++j)
          if (q.idx[t * c.K + j] == r.idx[t * c.K + k])
            l += up[t * c.K + k] * q.weight[t * c.K + j];
    if (extra)
      for (int64_t i = 0; i < T * c.E; ++i) l += up_s[i] * q.scores[i];
    return l;
  };
  double biggest = 0;
  for (double v : dz) biggest = std::max(biggest, std::abs(v));
  constexpr double h = 1e-6;
  for (int64_t t = 0; t < T; ++t) {
    if (r.gap[t] < 1e-4) continue;  // the choice itself may change
    const auto set = chosen(r, t);
    for (int64_t e = 0; e < c.E; ++e) {
      const int64_t i = t * c.E + e;
      const double keep = z[i];
      z[i] = keep + h;
      const double hi = loss();
      z[i] = keep - h;
      const double lo = loss();
      z[i] = keep;
      EXPECT_NEAR(dz[i], (hi - lo) / (2 * h), 1e-6 * std::max(1.0, biggest) + 1e-8);
      const bool sparse = !extra && (c.scoring == spec::Scoring::sigmoid);
      if (sparse && !set.count(static_cast<int32_t>(e))) {
        EXPECT_EQ(dz[i], 0.0);
      }
    }
  }
}

TEST(RouterBackward, V3Gate) { check_backward(v3_like(16, 4, 4, 2), true, false); }
TEST(RouterBackward, V3GateWithScoreGradient) { check_backward(v3_like(16, 4, 4, 2), true, true); }
TEST(RouterBackward, V3Unnormalised) {
  RouterConfig c = v3_like(16, 4, 4, 2);
  c.norm_topk_prob = false;
  check_backward(c, true, false);
}
TEST(RouterBackward, SoftmaxRenormalised) {
  check_backward(softmax_plain(10, 3, true), false, false);
}
TEST(RouterBackward, SoftmaxPlainScaled) {
  check_backward(softmax_plain(10, 3, false, 16.0), false, true);
}
TEST(RouterBackward, Switch) { check_backward(softmax_plain(10, 1, true), false, false); }

// Renormalised softmax: the normalisers cancel, unselected logits get nothing; un-renormalised: all
// get something.
TEST(RouterBackward, ZeroPatternOfSoftmax) {
  constexpr int64_t E = 10, K = 3;
  const auto z = normals(E, 11), up = normals(K, 12);
  for (const bool norm : {true, false}) {
    const RouterConfig c = softmax_plain(E, K, norm);
    const auto r = ref::route<double>(c, 1, z.data(), nullptr);
    std::vector<double> dz(E);
    ref::route_backward<double>(c, r, up.data(), nullptr, dz.data());
    const auto set = chosen(r, 0);
    for (int64_t e = 0; e < E; ++e)
      if (!set.count(static_cast<int32_t>(e))) {
        if (norm) {
          EXPECT_NEAR(dz[e], 0.0, 1e-16);
        } else {
          EXPECT_GT(std::abs(dz[e]), 1e-6);
        }
      }
  }
}

// ---- the kernel ----

void check_kernel(const RouterConfig& c, int64_t T, bool with_bias, double spread = 1.0) {
  SCOPED_TRACE("E" + std::to_string(c.E) + " K" + std::to_string(c.K) + " T" + std::to_string(T));
  const auto zd = normals(T * c.E, 20, spread), bd = normals(c.E, 21, 0.1);
  std::vector<float> z(zd.begin(), zd.end()), b(bd.begin(), bd.end());
  const std::vector<double> z64(z.begin(), z.end()), b64(b.begin(), b.end());
  std::vector<int32_t> idx(T * c.K, -1);
  std::vector<float> w(T * c.K, NAN), s(T * c.E, NAN);
  kern::router_select_cpu_simd(
      {c, T, z.data(), with_bias ? b.data() : nullptr, idx.data(), w.data(), s.data()});
  const auto r = ref::route<double>(c, T, z64.data(), with_bias ? b64.data() : nullptr);
  int64_t flips = 0;
  for (int64_t t = 0; t < T; ++t) {
    const std::set<int32_t> mine(idx.begin() + t * c.K, idx.begin() + (t + 1) * c.K);
    ASSERT_EQ(static_cast<int64_t>(mine.size()), c.K);
    if (mine != chosen(r, t)) {
      EXPECT_LT(r.gap[t], 1e-6);
      ++flips;
      continue;
    }
    for (int64_t k = 0; k < c.K; ++k) {
      const auto at =
          std::find(r.idx.begin() + t * c.K, r.idx.begin() + (t + 1) * c.K, idx[t * c.K + k]);
      EXPECT_NEAR(w[t * c.K + k] / r.weight[at - r.idx.begin()], 1.0, 2e-6);
    }
  }
  EXPECT_LE(flips, 1 + T / 1000);
  // Softmax: z - max is rounded at up to 20 (2^-20), which exp turns into a relative error.
  const double rel = c.scoring == spec::Scoring::softmax ? 3e-6 : 1e-6;
  for (int64_t i = 0; i < T * c.E; ++i) ASSERT_NEAR(s[i], r.scores[i], rel * r.scores[i]) << i;
}

TEST(RouterKernel, MatchesReference) {
  for (const int64_t T : {1, 5, 700}) {
    check_kernel(v3_like(256, 8, 8, 4), T, true);
    check_kernel(v3_like(256, 8, 8, 4), T, false, 4.0);
    check_kernel(v3_like(16, 4, 4, 2), T, true);
    check_kernel(v3_like(384, 8, 1, 1), T, true);
    check_kernel(v3_like(12, 3, 3, 2), T, true);
    check_kernel(v3_like(10, 10, 1, 1), T, true);
    check_kernel(v3_like(24, 5, 6, 3), T, true);
    check_kernel(softmax_plain(64, 6, false), T, false, 3.0);
    check_kernel(softmax_plain(9, 1, true), T, false);
    RouterConfig v2 = softmax_plain(160, 6, false, 16.0);
    v2.G = 8, v2.M = 3, v2.group_rule = spec::GroupRule::max;
    check_kernel(v2, T, false);
    RouterConfig zero = v3_like(32, 4, 4, 2);
    zero.router_mask = spec::RouterMask::zero;
    check_kernel(zero, T, true);
  }
}

TEST(RouterKernel, TiesExactly) {
  std::mt19937 rng(5);
  for (const RouterConfig& c :
       {v3_like(256, 8, 8, 4), v3_like(20, 6, 2, 1), v3_like(17, 4, 1, 1)}) {
    constexpr int64_t T = 40;
    std::vector<float> z(T * c.E);
    for (float& v : z) v = static_cast<float>(static_cast<int>(rng() % 3) - 1);
    std::vector<int32_t> idx(T * c.K);
    std::vector<float> w(T * c.K);
    kern::router_select_cpu_simd({c, T, z.data(), nullptr, idx.data(), w.data(), nullptr});
    EXPECT_EQ(idx, ref::route<float>(c, T, z.data(), nullptr).idx);
  }
}

// Inputs that are not numbers must not lead outside the experts.
TEST(RouterKernel, NanStaysInRange) {
  const RouterConfig c = v3_like(256, 8, 8, 4);
  std::vector<float> z(3 * 256, NAN), w(24);
  for (int64_t e = 0; e < 256; ++e) z[e] = static_cast<float>(e % 7);
  z[5] = NAN;
  std::vector<int32_t> idx(24, -1);
  kern::router_select_cpu_simd({c, 3, z.data(), nullptr, idx.data(), w.data(), nullptr});
  for (int32_t e : idx) EXPECT_TRUE(e >= 0 && e < 256);
  for (int64_t k = 8; k < 24; ++k) EXPECT_TRUE(std::isnan(w[k]));
}

TEST(RouterKernel, SameBitsOnAnyThreadCount) {
  const RouterConfig c = v3_like(256, 8, 8, 4);
  constexpr int64_t T = 300;
  const auto zd = normals(T * c.E, 30);
  const std::vector<float> z(zd.begin(), zd.end());
  std::vector<int32_t> idx[2];
  std::vector<float> w[2];
  const int before = omp_get_max_threads();
  for (int i = 0; i < 2; ++i) {
    omp_set_num_threads(i == 0 ? 1 : 3);
    idx[i].resize(T * c.K), w[i].resize(T * c.K);
    kern::router_select_cpu_simd({c, T, z.data(), nullptr, idx[i].data(), w[i].data(), nullptr});
  }
  omp_set_num_threads(before);
  EXPECT_EQ(idx[0], idx[1]);
  EXPECT_EQ(w[0], w[1]);
}

}  // namespace
}  // namespace v3b
