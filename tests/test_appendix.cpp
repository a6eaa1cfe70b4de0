// Sinkhorn, GRPO and EPLB against the golden values of SPEC Appendix A, known answers and
// properties (SPEC 1.21, 1.30, 1.31), and the vocabulary-parallel embedding (1.1).
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <numeric>

#include "model/error.h"
#include "model/rng.h"
#include "reference/embedding.h"
#include "reference/eplb.h"
#include "reference/grpo.h"
#include "reference/sinkhorn.h"
#include "tests/worst.h"

namespace v3b {
namespace {

std::vector<double> normals(size_t n, uint64_t stream, double scale = 1) {
  std::vector<double> v(n);
  for (size_t i = 0; i < n; ++i) v[i] = scale * model::rng_normal({7, stream}, i);
  return v;
}
double sigmoid(double x) { return 1 / (1 + std::exp(-x)); }
double column_error(int64_t n, const double* m) {
  double worst = 0;
  for (int64_t c = 0; c < n; ++c) {
    double s = 0;
    for (int64_t r = 0; r < n; ++r) s += m[r * n + c];
    worst = worse(worst, std::abs(s - 1));
  }
  return worst;
}

TEST(Sinkhorn, AppendixA) {
  const double z[4] = {1, 0, 0, 0};
  double m[4];
  ref::sinkhorn<double>(1, 2, z, m);
  const double expected[4] = {0.6224593312, 0.3775406688, 0.3775406688, 0.6224593312};
  for (int i = 0; i < 4; ++i) EXPECT_NEAR(m[i], expected[i], 5e-11) << i;
}

TEST(Sinkhorn, ClosedFormOfTwo) {
  const auto z = normals(50 * 4, 1);
  std::vector<double> m(z.size());
  ref::sinkhorn<double>(50, 2, z.data(), m.data(), 200);
  for (size_t t = 0; t < 50; ++t) {
    const double* l = &z[4 * t];
    const double p = sigmoid((l[0] + l[3] - l[1] - l[2]) / 2);
    EXPECT_NEAR(m[4 * t], p, 1e-12);
    EXPECT_NEAR(m[4 * t + 1], 1 - p, 1e-12);
    EXPECT_NEAR(m[4 * t + 2], 1 - p, 1e-12);
    EXPECT_NEAR(m[4 * t + 3], p, 1e-12);
  }
}

// One iteration by hand: exp = [[2,1],[1,1]], columns -> [[2/3,1/2],[1/3,1/2]], then rows. The
// other order gives the transposed matrix.
TEST(Sinkhorn, ColumnsBeforeRows) {
  const double z[4] = {std::log(2.0), 0, 0, 0};
  double m[4];
  ref::sinkhorn<double>(1, 2, z, m, 1);
  const double expected[4] = {4.0 / 7, 3.0 / 7, 2.0 / 5, 3.0 / 5};
  for (int i = 0; i < 4; ++i) EXPECT_NEAR(m[i], expected[i], 1e-15) << i;
}

TEST(Sinkhorn, DoublyStochastic) {
  constexpr int64_t T = 300, n = 4;
  const auto z = normals(T * n * n, 2);
  std::vector<double> m(z.size()), early(z.size());
  ref::sinkhorn<double>(T, n, z.data(), m.data());
  ref::sinkhorn<double>(T, n, z.data(), early.data(), 10);
  double worst = 0, worst_early = 0;
  for (int64_t t = 0; t < T; ++t) {
    const double* a = &m[size_t(t * n * n)];
    for (int64_t r = 0; r < n; ++r) {
      double s = 0;
      for (int64_t c = 0; c < n; ++c) {
        EXPECT_GE(a[r * n + c], 0);
        s += a[r * n + c];
      }
      EXPECT_NEAR(s, 1, 1e-14);
    }
    worst = worse(worst, column_error(n, a));
    worst_early = worse(worst_early, column_error(n, &early[size_t(t * n * n)]));
  }
  std::printf("sinkhorn columns: %.2g after 20 iterations, %.2g after 10\n", worst, worst_early);
  EXPECT_LE(worst, 1e-5);  // SPEC 1.30: 4e-6 over another 300 of standard deviation 1
  EXPECT_LT(worst, worst_early);
  // The product of two stays doubly stochastic, and the mean over streams is kept.
  const double *a = &m[0], *b = &m[n * n];
  double ab[n * n] = {};
  for (int i = 0; i < n; ++i)
    for (int j = 0; j < n; ++j)
      for (int k = 0; k < n; ++k) ab[i * n + j] += a[i * n + k] * b[k * n + j];
  EXPECT_LE(column_error(n, ab), column_error(n, a) + column_error(n, b) + 1e-14);
  const auto x = normals(n, 3);
  double before = 0, after = 0, bound = 1e-14;
  for (int i = 0; i < n; ++i) {
    before += x[size_t(i)] / n;
    bound += column_error(n, a) * std::abs(x[size_t(i)]) / n;
    for (int k = 0; k < n; ++k) after += a[i * n + k] * x[size_t(k)] / n;
  }
  EXPECT_NEAR(before, after, bound);
}

TEST(Sinkhorn, WideLogitsStayFinite) {
  std::vector<float> z(16, 0), m(16);
  for (size_t i = 0; i < 4; ++i) z[5 * i] = 40;  // 40 I of SPEC 1.30: the identity
  ref::sinkhorn<float>(1, 4, z.data(), m.data());
  for (size_t i = 0; i < 16; ++i) EXPECT_NEAR(m[i], i % 5 == 0 ? 1 : 0, 1e-6);
  for (size_t i = 0; i < 16; ++i) z[i] = i < 4 ? -2000.0f : 300.0f * float(i % 3);
  ref::sinkhorn<float>(1, 4, z.data(), m.data());
  for (size_t r = 0; r < 4; ++r)
    EXPECT_NEAR(m[4 * r] + m[4 * r + 1] + m[4 * r + 2] + m[4 * r + 3], 1, 1e-6);
  EXPECT_THROW(ref::sinkhorn<float>(1, 0, z.data(), m.data()), Error);
  EXPECT_THROW(ref::sinkhorn<float>(1, 4, z.data(), m.data(), 0), Error);
}

TEST(Sinkhorn, Gradient) {
  constexpr int64_t T = 3, n = 4;
  auto z = normals(T * n * n, 4);
  const auto w = normals(z.size(), 5);
  std::vector<double> d(z.size()), m(z.size());
  const auto loss = [&] {
    ref::sinkhorn<double>(T, n, z.data(), m.data());
    return std::inner_product(m.begin(), m.end(), w.begin(), 0.0);
  };
  ref::sinkhorn_backward<double>(T, n, z.data(), w.data(), d.data());
  for (size_t i = 0; i < z.size(); ++i) {
    const double keep = z[i], h = 1e-5;
    z[i] = keep + h;
    const double up = loss();
    z[i] = keep - h;
    const double down = loss();
    z[i] = keep;
    EXPECT_NEAR((up - down) / (2 * h), d[i], 1e-6 * std::abs(d[i]) + 1e-8) << i;
  }
}

TEST(Grpo, AppendixA) {
  const double r[4] = {1, 0, 0, 1};
  EXPECT_EQ(ref::grpo_advantages(r), (std::vector<double>{1, -1, -1, 1}));
  EXPECT_NEAR(ref::grpo_k3(std::log(0.8)), 0.0231435513, 5e-11);
  const double equal[3] = {0.1, 0.1, 0.1};
  EXPECT_EQ(ref::grpo_advantages(equal), (std::vector<double>(3, 0.0)));
  EXPECT_THROW(ref::grpo_advantages({}), Error);
  const double bad[2] = {1, std::nan("")};
  EXPECT_THROW(ref::grpo_advantages(bad), Error);
}

TEST(Grpo, K3IsNeverNegative) {
  EXPECT_EQ(ref::grpo_k3(0), 0);
  for (double x : normals(1000, 11, 1.0)) {
    EXPECT_GT(ref::grpo_k3(x), 0) << x;
    EXPECT_NEAR(ref::grpo_k3(x), std::exp(x) - x - 1, 1e-12 * std::exp(std::abs(x)));
  }
  // Near 0 exp(x) - x - 1 cancels; k3 is x^2/2 there.
  EXPECT_NEAR(ref::grpo_k3(1e-6) / 0.5e-12, 1, 1e-3);
}

// min(rho A, clip(rho) A): clipped above for A > 0, below for A < 0, and nowhere else.
TEST(Grpo, ClippingTruthTable) {
  struct Row {
    double rho, a, value, grad;
  };
  const Row rows[] = {{0.5, 2, 1.0, 1.0},   {1.0, 2, 2.0, 2.0},    {1.5, 2, 2.4, 0.0},
                      {0.5, -2, -1.6, 0.0}, {1.0, -2, -2.0, -2.0}, {1.5, -2, -3.0, -3.0},
                      {0.5, 0, 0, 0},       {1.5, 0, 0, 0}};
  for (const Row& r : rows) {
    const ref::Clipped c = ref::grpo_clipped(std::log(r.rho), r.a, 0.2);
    EXPECT_NEAR(c.value, r.value, 1e-14) << r.rho << " " << r.a;
    EXPECT_NEAR(c.grad, r.grad, 1e-14) << r.rho << " " << r.a;
  }
  // A ratio that overflows: clipped, or without weight, never NaN.
  EXPECT_NEAR(ref::grpo_clipped(1000, 1, 0.2).value, 1.2, 1e-15);
  EXPECT_EQ(ref::grpo_clipped(1000, 0, 0.2).value, 0);
}

TEST(Grpo, EqualPolicies) {
  const auto logp = normals(6, 12);
  const auto a = ref::grpo_advantages(normals(6, 13));
  const auto r = ref::grpo_sequence(logp, logp, logp, a);
  EXPECT_NEAR(r.objective, 0, 1e-15);
  EXPECT_EQ(r.kl, 0);
  EXPECT_EQ(r.clipped_share, 0);
  for (size_t i = 0; i < 6; ++i) EXPECT_NEAR(r.grad[i], a[i] / 6, 1e-16);
}

TEST(Grpo, TokenLevelAndGradient) {
  const std::vector<int64_t> lengths{3, 1, 5, 2};
  auto logp = normals(11, 14, 0.3);
  const auto old = normals(11, 15, 0.3), base = normals(11, 16, 0.3);
  const auto a = ref::grpo_advantages(normals(4, 17));
  const ref::GrpoOptions o{0.2, 0.5};
  const auto r = ref::grpo_token(logp, old, base, a, lengths, o);
  // Written out again from the formula.
  double expected = 0;
  size_t k = 0;
  for (size_t i = 0; i < 4; ++i) {
    double sum = 0;
    for (int64_t t = 0; t < lengths[i]; ++t, ++k) {
      const double rho = std::exp(logp[k]) / std::exp(old[k]), q = std::exp(base[k] - logp[k]);
      sum += std::min(rho * a[i], std::min(std::max(rho, 0.8), 1.2) * a[i]) -
             0.5 * (q - std::log(q) - 1);
    }
    expected += sum / double(lengths[i]) / 4;
  }
  EXPECT_NEAR(r.objective, expected, 1e-14);
  EXPECT_NEAR(r.objective, r.surrogate - 0.5 * r.kl, 1e-15);
  EXPECT_GT(r.clipped_share, 0);
  EXPECT_LT(r.clipped_share, 1);
  for (size_t i = 0; i < 11; ++i) {
    const double keep = logp[i], h = 1e-6;
    logp[i] = keep + h;
    const double up = ref::grpo_token(logp, old, base, a, lengths, o).objective;
    logp[i] = keep - h;
    const double down = ref::grpo_token(logp, old, base, a, lengths, o).objective;
    logp[i] = keep;
    EXPECT_NEAR((up - down) / (2 * h), r.grad[i], 1e-6 * std::abs(r.grad[i]) + 1e-8) << i;
  }
  // Outputs of one token: the two levels agree; and they differ where lengths do.
  const std::vector<int64_t> ones(4, 1);
  const std::span<const double> l(logp), lo(old), lr(base);
  const auto s = ref::grpo_sequence(l.first(4), lo.first(4), lr.first(4), a, o);
  const auto t = ref::grpo_token(l.first(4), lo.first(4), lr.first(4), a, ones, o);
  EXPECT_EQ(s.objective, t.objective);
  EXPECT_EQ(s.grad, t.grad);
  EXPECT_THROW(ref::grpo_token(l.first(4), lo, lr.first(4), a, ones, o), Error);
  EXPECT_THROW(ref::grpo_sequence(l.first(4), lo.first(4), lr.first(4), a, {0, 0}), Error);
}

const double kLoads[24] = {90, 132, 40,  61, 104, 165, 39,  4,   73,  56, 183, 86,
                           20, 107, 104, 64, 19,  197, 187, 157, 172, 86, 16,  27};
const ref::EplbShape kShape{12, 16, 4, 2, 8};

double max_over_mean(const std::vector<double>& v) {
  return *std::max_element(v.begin(), v.end()) * double(v.size()) /
         std::accumulate(v.begin(), v.end(), 0.0);
}

TEST(Eplb, KnownAnswer) {
  const auto p = ref::eplb(2, kLoads, kShape);
  EXPECT_EQ(p.phy2log,
            (std::vector<int64_t>{5, 6,  5, 7, 8, 4,  3, 4, 10, 9, 10, 2, 0, 1, 11, 1,  //
                                  7, 10, 6, 8, 6, 11, 8, 9, 2,  4, 5,  1, 5, 0, 3,  1}));
  const double ratio[2] = {1.208, 1.242};
  for (size_t l = 0; l < 2; ++l)
    EXPECT_NEAR(max_over_mean(ref::eplb_gpu_load(kShape, kLoads + 12 * l, &p.phy2log[16 * l],
                                                 &p.logcnt[12 * l])),
                ratio[l], 5e-4);
}

TEST(Eplb, BalancedPacking) {
  const double w[6] = {1, 5, 4, 3, 2, 6};
  // 6 -> 0, 5 -> 1, 4 -> 1 (5 < 6), 3 -> 0, 2 -> 0 (tie at 9: first pack), 1 -> 1.
  const auto p = ref::balanced_packing(w, 2);
  EXPECT_EQ(p.pack, (std::vector<int64_t>{1, 1, 1, 0, 0, 0}));
  EXPECT_EQ(p.rank, (std::vector<int64_t>{2, 0, 1, 1, 2, 0}));
  EXPECT_EQ(ref::balanced_packing(w, 6).pack, (std::vector<int64_t>{0, 1, 2, 3, 4, 5}));
  EXPECT_EQ(ref::balanced_packing(w, 6).rank, std::vector<int64_t>(6, 0));
  EXPECT_THROW(ref::balanced_packing(w, 4), Error);
  EXPECT_THROW(ref::balanced_packing(w, 0), Error);
}

TEST(Eplb, Replicate) {
  const double w[3] = {6, 4, 6};
  // 0 (tie with 2: first), 2, then 1 (4 > 3), then 0 (3 = 3: first).
  const auto r = ref::replicate(w, 7);
  EXPECT_EQ(r.phy2log, (std::vector<int64_t>{0, 1, 2, 0, 2, 1, 0}));
  EXPECT_EQ(r.rank, (std::vector<int64_t>{0, 0, 0, 1, 1, 1, 2}));
  EXPECT_EQ(r.logcnt, (std::vector<int64_t>{3, 2, 2}));
  EXPECT_THROW(ref::replicate(w, 2), Error);
}

void check_placement(const ref::EplbShape& s, int64_t layers, const std::vector<double>& w,
                     const ref::Placement& p) {
  ASSERT_EQ(p.phy2log.size(), size_t(layers * s.P));
  ASSERT_EQ(p.log2phy.size(), size_t(layers * s.E * p.max_count));
  for (int64_t l = 0; l < layers; ++l) {
    int64_t total = 0;
    double plain = 0, replicated = 0;
    std::vector<int64_t> seen(size_t(s.P), 0);
    for (int64_t e = 0; e < s.E; ++e) {
      const int64_t count = p.logcnt[size_t(l * s.E + e)];
      EXPECT_GE(count, 1);
      total += count;
      plain = std::max(plain, w[size_t(l * s.E + e)]);
      replicated = std::max(replicated, w[size_t(l * s.E + e)] / double(count));
      for (int64_t k = 0; k < p.max_count; ++k) {
        const int64_t phy = p.log2phy[size_t((l * s.E + e) * p.max_count + k)];
        EXPECT_EQ(phy >= 0, k < count);
        if (phy < 0) continue;
        EXPECT_EQ(p.phy2log[size_t(l * s.P + phy)], e);
        ++seen[size_t(phy)];
      }
    }
    EXPECT_EQ(total, s.P);
    EXPECT_EQ(seen, std::vector<int64_t>(size_t(s.P), 1));
    EXPECT_LE(replicated, plain);
    // Every replica's load reaches some GPU.
    const auto gpu = ref::eplb_gpu_load(s, &w[size_t(l * s.E)], &p.phy2log[size_t(l * s.P)],
                                        &p.logcnt[size_t(l * s.E)]);
    EXPECT_NEAR(std::accumulate(gpu.begin(), gpu.end(), 0.0),
                std::accumulate(&w[size_t(l * s.E)], &w[size_t(l * s.E)] + s.E, 0.0), 1e-9);
  }
}

TEST(Eplb, Properties) {
  const ref::EplbShape shapes[] = {
      kShape,          {256, 288, 8, 4, 32}, {256, 288, 8, 1, 144}, {256, 320, 8, 8, 64},
      {8, 8, 4, 2, 4}, {6, 9, 1, 1, 3}};
  for (const ref::EplbShape& s : shapes) {
    constexpr int64_t layers = 3;
    auto w = normals(size_t(layers * s.E), 21 + uint64_t(s.P));
    for (double& x : w) x = std::exp(x);
    const auto h = ref::eplb(layers, w.data(), s, ref::EplbPolicy::hierarchical);
    check_placement(s, layers, w, h);
    check_placement(s, layers, w, ref::eplb(layers, w.data(), s, ref::EplbPolicy::global));
    // Hierarchical: all replicas of a group lie on one node.
    for (int64_t l = 0; l < layers; ++l) {
      std::vector<int64_t> node(size_t(s.groups), -1);
      for (int64_t p = 0; p < s.P; ++p) {
        int64_t& n = node[size_t(h.phy2log[size_t(l * s.P + p)] / (s.E / s.groups))];
        if (n < 0) n = p / (s.P / s.nodes);
        EXPECT_EQ(n, p / (s.P / s.nodes));
      }
    }
  }
}

TEST(Eplb, PoliciesAndErrors) {
  ref::EplbShape odd = kShape;
  odd.groups = 3;  // 3 % 2 nodes != 0: global
  EXPECT_EQ(ref::eplb(2, kLoads, odd).phy2log,
            ref::eplb(2, kLoads, kShape, ref::EplbPolicy::global).phy2log);
  EXPECT_NE(ref::eplb(2, kLoads, kShape, ref::EplbPolicy::global).phy2log,
            ref::eplb(2, kLoads, kShape).phy2log);
  EXPECT_THROW(ref::eplb(2, kLoads, odd, ref::EplbPolicy::hierarchical), Error);
  EXPECT_THROW(ref::eplb(2, kLoads, {12, 17, 4, 2, 8}), Error);
  EXPECT_THROW(ref::eplb(2, kLoads, {12, 8, 4, 2, 8}), Error);
  double nan[12];
  std::copy(kLoads, kLoads + 12, nan);
  nan[3] = std::nan("");
  EXPECT_THROW(ref::eplb(1, nan, kShape), Error);
}

template <class S>
class VocabularyParallel : public testing::Test {};
using Floats = testing::Types<float, double>;
TYPED_TEST_SUITE(VocabularyParallel, Floats);

// Rank r owns rows [r V/R, (r+1) V/R); the all-reduce sum of the parts is the single table's
// gather.
TYPED_TEST(VocabularyParallel, SumOfThePartsIsTheGather) {
  using S = TypeParam;
  constexpr int64_t V = 37, d = 5, T = 64;
  std::vector<S> table(V * d), whole(T * d);
  for (size_t i = 0; i < table.size(); ++i) table[i] = S(model::rng_normal({31, 1}, i));
  std::vector<int32_t> ids(T);
  for (size_t t = 0; t < T; ++t) ids[t] = int32_t(t < V ? t : model::rng_below({31, 2}, t, V));
  ref::embedding<S>(T, d, V, ids.data(), table.data(), whole.data());
  for (int64_t R : {1, 2, 3, 8, 37}) {
    std::vector<S> sum(T * d, S(0)), y(T * d);
    std::vector<int> owners(T, 0);
    for (int64_t r = 0; r < R; ++r) {
      const int64_t first = r * V / R, rows = (r + 1) * V / R - first;
      // A copy: reading beyond the rank's rows would be an error that a sanitizer sees.
      const std::vector<S> part(table.begin() + first * d, table.begin() + (first + rows) * d);
      ref::embedding_part<S>(T, d, V, first, rows, ids.data(), part.data(), y.data());
      for (size_t t = 0; t < T; ++t) {
        const bool mine = ids[t] >= first && ids[t] < first + rows;
        owners[t] += mine;
        for (size_t i = 0; i < d; ++i) {
          EXPECT_EQ(y[t * d + i] != 0, mine);
          sum[t * d + i] += y[t * d + i];
        }
      }
    }
    EXPECT_EQ(owners, std::vector<int>(T, 1)) << R;
    EXPECT_EQ(std::memcmp(sum.data(), whole.data(), sum.size() * sizeof(S)), 0) << R;
  }
  const int32_t bad[2] = {0, int32_t(V)}, negative[1] = {-1};
  std::vector<S> y(2 * d);
  EXPECT_THROW(ref::embedding_part<S>(2, d, V, 0, 10, bad, table.data(), y.data()), Error);
  EXPECT_THROW(ref::embedding_part<S>(1, d, V, 0, 10, negative, table.data(), y.data()), Error);
}

// The one exception to "bitwise": -0 in the table comes out of a sum with +0 as +0.
TEST(VocabularyParallelZero, MinusZeroBecomesPlusZero) {
  const double table[2] = {-0.0, 1.0};
  const int32_t id[1] = {0};
  double whole, a, b;
  ref::embedding<double>(1, 1, 2, id, table, &whole);
  ref::embedding_part<double>(1, 1, 2, 0, 1, id, table, &a);
  ref::embedding_part<double>(1, 1, 2, 1, 1, id, table + 1, &b);
  EXPECT_TRUE(std::signbit(whole));
  EXPECT_TRUE(std::signbit(a));
  EXPECT_FALSE(std::signbit(a + b));
  EXPECT_EQ(a + b, whole);
}

}  // namespace
}  // namespace v3b
