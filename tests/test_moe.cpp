// Dispatch, capacity, experts and combine: identities of SPEC 1.13-1.16, backward of 3.4 and 3.5.
// The kernels against this reference: test_moe_kernels.cpp.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>
#include <numeric>
#include <random>
#include <vector>

#include "reference/moe.h"
#include "tests/normals.h"

namespace v3b {
namespace {

using ref::Ffn;
using ref::FfnGrad;
using spec::DropPolicy;

std::vector<int32_t> random_routes(int64_t T, int64_t E, int64_t K, uint64_t seed) {
  std::mt19937_64 rng(seed);
  std::vector<int32_t> order(E), idx;
  std::iota(order.begin(), order.end(), 0);
  for (int64_t t = 0; t < T; ++t) {
    std::shuffle(order.begin(), order.end(), rng);
    idx.insert(idx.end(), order.begin(), order.begin() + K);
  }
  return idx;
}

struct Weights {
  int64_t d, m;
  std::vector<double> gate, up, down;
  Weights(int64_t d_, int64_t m_, uint64_t seed)
      : d(d_),
        m(m_),
        gate(normals(m * d, seed, 0.4)),
        up(normals(m * d, seed + 1, 0.4)),
        down(normals(m * d, seed + 2, 0.4)) {}
  Ffn<double> view() const { return {gate.data(), up.data(), down.data()}; }
};
struct Problem {
  int64_t T, d, m, E, K, shared_m;
  std::vector<double> x, w;
  std::vector<int32_t> idx;
  std::vector<Weights> experts;
  Weights shared;
  Problem(int64_t T_, int64_t d_, int64_t m_, int64_t E_, int64_t K_, int64_t sm, uint64_t seed)
      : T(T_),
        d(d_),
        m(m_),
        E(E_),
        K(K_),
        shared_m(sm),
        x(normals(T * d, seed)),
        w(normals(T * K, seed + 1)),
        idx(random_routes(T, E, K, seed + 2)),
        shared(d, sm, seed + 3) {
    for (int64_t e = 0; e < E; ++e) experts.emplace_back(d, m, seed + 10 + 3 * e);
  }
  std::vector<Ffn<double>> views() const {
    std::vector<Ffn<double>> v;
    for (const Weights& e : experts) v.push_back(e.view());
    return v;
  }
  std::vector<double> run() const {
    std::vector<double> y(T * d, std::nan(""));
    ref::moe<double>(T, d, m, E, K, x.data(), idx.data(), w.data(), views(),
                     shared_m > 0 ? shared.view() : Ffn<double>{}, shared_m, y.data());
    return y;
  }
};
double max_diff(const std::vector<double>& a, const std::vector<double>& b) {
  EXPECT_EQ(a.size(), b.size());
  double worst = 0;
  for (size_t i = 0; i < a.size(); ++i) {
    const double e = std::abs(a[i] - b[i]);
    if (!(e <= worst)) worst = e;
  }
  return worst;
}
// One row through one expert, written out.
std::vector<double> plain_ffn(const Weights& w, const double* x) {
  std::vector<double> h(w.m), y(w.d, 0.0);
  for (int64_t i = 0; i < w.m; ++i) {
    double a = 0, u = 0;
    for (int64_t j = 0; j < w.d; ++j)
      a += w.gate[i * w.d + j] * x[j], u += w.up[i * w.d + j] * x[j];
    h[i] = a / (1 + std::exp(-a)) * u;
  }
  for (int64_t j = 0; j < w.d; ++j)
    for (int64_t i = 0; i < w.m; ++i) y[j] += w.down[j * w.m + i] * h[i];
  return y;
}

// ---- dispatch ----

TEST(Dispatch, StableSortByExpert) {
  const std::vector<int32_t> idx{2, 0, 1, 2, 0, 2};  // T=3, K=2
  const auto p = ref::dispatch(3, 2, 4, idx.data());
  EXPECT_EQ(p.counts, (std::vector<int64_t>{2, 1, 3, 0}));
  EXPECT_EQ(p.offsets, (std::vector<int64_t>{0, 2, 3, 6, 6}));
  EXPECT_EQ(p.slot, (std::vector<int64_t>{1, 4, 2, 0, 3, 5}));
  EXPECT_EQ(p.row, (std::vector<int64_t>{3, 0, 2, 4, 1, 5}));
}

TEST(Dispatch, CountsAndInverse) {
  constexpr int64_t T = 50, K = 6, E = 16;
  const auto idx = random_routes(T, E, K, 1);
  const auto p = ref::dispatch(T, K, E, idx.data());
  EXPECT_EQ(std::accumulate(p.counts.begin(), p.counts.end(), int64_t{0}), T * K);
  for (int64_t i = 0; i < T * K; ++i) EXPECT_EQ(p.slot[p.row[i]], i);
  for (int64_t e = 0; e < E; ++e)
    for (int64_t r = p.offsets[e]; r < p.offsets[e + 1]; ++r) {
      EXPECT_EQ(idx[p.slot[r]], e);
      if (r > p.offsets[e]) {
        EXPECT_LT(p.slot[r - 1], p.slot[r]);
      }
    }
}

TEST(Dispatch, UnusedSlots) {
  const std::vector<int32_t> idx{1, -1, -1, 0};
  const auto p = ref::dispatch(2, 2, 2, idx.data());
  EXPECT_EQ(p.counts, (std::vector<int64_t>{1, 1}));
  EXPECT_EQ(p.row, (std::vector<int64_t>{1, -1, -1, 0}));
}

// Rows out and back with weights that sum to one give x, bitwise for weights 1/4; and the gather's
// adjoint is the scatter-add: <G x, y> = <x, G' y>.
TEST(Dispatch, CombineIdentityAndAdjoint) {
  constexpr int64_t T = 20, K = 4, E = 8, d = 5;
  const auto x = normals(T * d, 2), y = normals(T * K * d, 3);
  const auto idx = random_routes(T, E, K, 4);
  const auto p = ref::dispatch(T, K, E, idx.data());
  const std::vector<double> quarter(T * K, 0.25), ones(T * K, 1.0);
  std::vector<double> rows(T * K * d), back(T * d), scattered(T * d);
  ref::dispatch_rows<double>(p, K, d, x.data(), rows.data());
  for (int64_t r = 0; r < T * K; ++r)
    for (int64_t j = 0; j < d; ++j) EXPECT_EQ(rows[r * d + j], x[p.slot[r] / K * d + j]);
  ref::combine_rows<double>(p, T, K, d, rows.data(), quarter.data(), back.data());
  EXPECT_EQ(back, x);
  ref::combine_rows<double>(p, T, K, d, y.data(), ones.data(), scattered.data());
  EXPECT_NEAR(std::inner_product(rows.begin(), rows.end(), y.begin(), 0.0),
              std::inner_product(x.begin(), x.end(), scattered.begin(), 0.0), 1e-11);
}

TEST(Dispatch, ContiguousLayout) {
  const auto l = ref::contiguous_layout({3, 0, 4, 1}, 4);
  EXPECT_EQ(l.m_indices, (std::vector<int32_t>{0, 0, 0, -1, 2, 2, 2, 2, 3, -1, -1, -1}));
  EXPECT_EQ(l.padded_row, (std::vector<int64_t>{0, 1, 2, 4, 5, 6, 7, 8}));
}

// ---- capacity ----

TEST(Capacity, Formula) {
  EXPECT_EQ(ref::expert_capacity(1.0, 1, 100, 8), 13);  // ceil(12.5)
  EXPECT_EQ(ref::expert_capacity(1.25, 2, 64, 8), 20);
  EXPECT_EQ(ref::expert_capacity(1.0, 1, 2, 64), 1);  // at least one
  EXPECT_EQ(ref::expert_capacity(std::numeric_limits<double>::infinity(), 4, 10, 2), 40);
}

// Four tokens, two choices each, three experts, two places an expert.
//   token: first, second   gates
//   0:     A,     B        .6 .4
//   1:     A,     C        .9 .1
//   2:     B,     A        .5 .5
//   3:     A,     B        .7 .3
struct CapacityCase {
  std::vector<int32_t> idx{0, 1, 0, 2, 1, 0, 0, 1};
  std::vector<double> gate{.6, .4, .9, .1, .5, .5, .7, .3};
  std::vector<char> keep(int64_t capacity, DropPolicy p) const {
    return ref::apply_capacity(4, 2, 3, idx.data(), gate.data(), capacity, p);
  }
};

TEST(Capacity, ExactSets) {
  const CapacityCase c;
  // slot: first choices A(0) A(1) B(2), A(3) is full; second B(0), C(1), A(2) full, B(3) full.
  EXPECT_EQ(c.keep(2, DropPolicy::slot), (std::vector<char>{1, 1, 1, 1, 1, 0, 0, 0}));
  // token: A(0) B(0) A(1) C(1) B(2), A(2) full, A(3) full, B(3) full: here the same as slot order
  // ...
  EXPECT_EQ(c.keep(2, DropPolicy::token), (std::vector<char>{1, 1, 1, 1, 1, 0, 0, 0}));
  // ... with one place they differ: slot gives B to token 2's first choice, token gives it to token
  // 0's second.
  EXPECT_EQ(c.keep(1, DropPolicy::slot), (std::vector<char>{1, 0, 0, 1, 1, 0, 0, 0}));
  EXPECT_EQ(c.keep(1, DropPolicy::token), (std::vector<char>{1, 1, 0, 1, 0, 0, 0, 0}));
  // prob: A: .9 (1), .7 (3) stay, .6 (0) and .5 (2) go; B: .5 (2), .4 (0) stay, .3 (3) goes; C: .1
  // (1).
  EXPECT_EQ(c.keep(2, DropPolicy::prob), (std::vector<char>{0, 1, 1, 1, 1, 0, 1, 0}));
  EXPECT_EQ(c.keep(1, DropPolicy::prob), (std::vector<char>{0, 0, 1, 1, 1, 0, 0, 0}));
}

TEST(Capacity, BalancedDropsNothing) {
  constexpr int64_t T = 16, K = 2, E = 8;
  std::vector<int32_t> idx;
  for (int64_t i = 0; i < T * K; ++i) idx.push_back(static_cast<int32_t>(i % E));
  const std::vector<double> gate(T * K, 0.5);
  for (const DropPolicy p : {DropPolicy::slot, DropPolicy::token, DropPolicy::prob}) {
    const auto keep = ref::apply_capacity(T, K, E, idx.data(), gate.data(),
                                          ref::expert_capacity(1.0, K, T, E), p);
    EXPECT_EQ(std::count(keep.begin(), keep.end(), 1), T * K);
  }
}

// Capacity infinity is bitwise the plain layer; dropped assignments contribute nothing and the
// others keep their gates; the shared expert stays.
TEST(Capacity, DropMeansZeroAndNoRenormalisation) {
  const Problem p(12, 6, 5, 4, 2, 7, 100);
  const auto full = p.run();
  const auto with_capacity = [&](int64_t capacity) {
    Problem q = p;
    const auto keep =
        ref::apply_capacity(p.T, p.K, p.E, p.idx.data(), p.w.data(), capacity, DropPolicy::slot);
    for (int64_t i = 0; i < p.T * p.K; ++i)
      if (!keep[i]) q.idx[i] = -1;
    return std::pair(q.run(), keep);
  };
  EXPECT_EQ(
      with_capacity(ref::expert_capacity(std::numeric_limits<double>::infinity(), p.K, p.T, p.E))
          .first,
      full);
  const auto [y, keep] = with_capacity(3);
  EXPECT_LT(std::count(keep.begin(), keep.end(), 1), p.T * p.K);
  std::vector<double> expected(p.T * p.d);
  for (int64_t t = 0; t < p.T; ++t) {
    auto sum = plain_ffn(p.shared, p.x.data() + t * p.d);
    for (int64_t k = 0; k < p.K; ++k) {
      if (!keep[t * p.K + k]) continue;
      const auto o = plain_ffn(p.experts[p.idx[t * p.K + k]], p.x.data() + t * p.d);
      for (int64_t j = 0; j < p.d; ++j) sum[j] += p.w[t * p.K + k] * o[j];
    }
    std::copy(sum.begin(), sum.end(), expected.begin() + t * p.d);
  }
  EXPECT_LT(max_diff(y, expected), 1e-12);
}

// ---- experts ----

// Expert with gate = up = down = 1 in one dimension: silu(x) * x.
TEST(Ffn, PublishedSilu) {
  const double one = 1;
  for (const auto& [x, silu] : {std::pair{1.0, 0.7310585786}, {-20.0, -4.122307e-8}}) {
    double y = 0;
    ref::ffn<double>(1, 1, 1, &x, {&one, &one, &one}, &y);
    EXPECT_NEAR(y / x / silu, 1.0, 2e-7);
  }
  const double big = -800;  // exp(800) overflows
  double y = 1;
  ref::ffn<double>(1, 1, 1, &big, {&one, &one, &one}, &y);
  EXPECT_EQ(y, 0.0);
}

TEST(Moe, EqualsDenseSumWithZeroGates) {
  const Problem p(9, 7, 6, 5, 2, 4, 200);
  std::vector<double> gate(p.T * p.E, 0.0), expected(p.T * p.d);
  for (int64_t i = 0; i < p.T * p.K; ++i) gate[i / p.K * p.E + p.idx[i]] = p.w[i];
  for (int64_t t = 0; t < p.T; ++t) {
    auto sum = plain_ffn(p.shared, p.x.data() + t * p.d);
    for (int64_t e = 0; e < p.E; ++e) {
      const auto o = plain_ffn(p.experts[e], p.x.data() + t * p.d);
      for (int64_t j = 0; j < p.d; ++j) sum[j] += gate[t * p.E + e] * o[j];
    }
    std::copy(sum.begin(), sum.end(), expected.begin() + t * p.d);
  }
  EXPECT_LT(max_diff(p.run(), expected), 1e-12);
}

TEST(Moe, TokenPermutation) {
  const Problem p(15, 6, 5, 4, 2, 3, 300);
  const auto y = p.run();
  std::vector<int64_t> perm(p.T);
  std::iota(perm.begin(), perm.end(), 0);
  std::shuffle(perm.begin(), perm.end(), std::mt19937(1));
  Problem q = p;
  for (int64_t t = 0; t < p.T; ++t) {
    std::copy_n(p.x.begin() + perm[t] * p.d, p.d, q.x.begin() + t * p.d);
    std::copy_n(p.idx.begin() + perm[t] * p.K, p.K, q.idx.begin() + t * p.K);
    std::copy_n(p.w.begin() + perm[t] * p.K, p.K, q.w.begin() + t * p.K);
  }
  const auto z = q.run();
  for (int64_t t = 0; t < p.T; ++t)
    for (int64_t j = 0; j < p.d; ++j) EXPECT_NEAR(z[t * p.d + j], y[perm[t] * p.d + j], 1e-12);
}

// One shared expert of width 2m equals two of width m: rows of gate and up, columns of down.
TEST(Moe, SharedWidthSplit) {
  constexpr int64_t T = 4, d = 5, m = 3;
  const Weights wide(d, 2 * m, 400);
  const auto x = normals(T * d, 401);
  std::vector<double> whole(T * d), sum(T * d, 0.0);
  ref::ffn<double>(T, d, 2 * m, x.data(), wide.view(), whole.data());
  for (int64_t half = 0; half < 2; ++half) {
    Weights part(d, m, 0);
    std::copy_n(wide.gate.begin() + half * m * d, m * d, part.gate.begin());
    std::copy_n(wide.up.begin() + half * m * d, m * d, part.up.begin());
    for (int64_t j = 0; j < d; ++j)
      std::copy_n(wide.down.begin() + j * 2 * m + half * m, m, part.down.begin() + j * m);
    std::vector<double> y(T * d);
    ref::ffn<double>(T, d, m, x.data(), part.view(), y.data());
    for (int64_t i = 0; i < T * d; ++i) sum[i] += y[i];
  }
  EXPECT_LT(max_diff(whole, sum), 1e-12);
}

// The shared expert is added as it is: no gate, no scale.
TEST(Moe, SharedIsUnscaled) {
  Problem p(3, 5, 4, 3, 1, 6, 500);
  std::fill(p.w.begin(), p.w.end(), 0.0);
  const auto y = p.run();
  for (int64_t t = 0; t < p.T; ++t) {
    const auto s = plain_ffn(p.shared, p.x.data() + t * p.d);
    for (int64_t j = 0; j < p.d; ++j) EXPECT_NEAR(y[t * p.d + j], s[j], 1e-12);
  }
}

TEST(Moe, UnchosenExpertsAreNeverRead) {
  Problem p(6, 5, 4, 8, 2, 0, 600);
  for (int32_t& e : p.idx) e = e % 3;
  const auto y = p.run();
  for (size_t e = 3; e < 8; ++e) {
    std::fill(p.experts[e].gate.begin(), p.experts[e].gate.end(), NAN);
    std::fill(p.experts[e].down.begin(), p.experts[e].down.end(), NAN);
  }
  EXPECT_EQ(p.run(), y);
}

// ---- backward, SPEC 3.4 and 3.5 ----

void check_moe_backward(Problem p) {
  const auto up = normals(p.T * p.d, 900);
  const auto loss = [&] {
    const auto y = p.run();
    return std::inner_product(y.begin(), y.end(), up.begin(), 0.0);
  };
  std::vector<Weights> grads;
  std::vector<FfnGrad<double>> eg;
  for (int64_t e = 0; e <= p.E; ++e) {
    grads.emplace_back(p.d, e < p.E ? p.m : p.shared_m, 0);
    for (auto* v : {&grads[e].gate, &grads[e].up, &grads[e].down})
      std::fill(v->begin(), v->end(), 0.0);
  }
  for (int64_t e = 0; e < p.E; ++e)
    eg.push_back({grads[e].gate.data(), grads[e].up.data(), grads[e].down.data()});
  Weights& gs = grads[p.E];
  std::vector<double> dx(p.T * p.d, 0.125),
      dw(p.T * p.K, std::nan(""));  // dx is accumulated, dw overwritten
  ref::moe_backward<double>(p.T, p.d, p.m, p.E, p.K, p.x.data(), p.idx.data(), p.w.data(),
                            p.views(), p.shared_m > 0 ? p.shared.view() : Ffn<double>{}, p.shared_m,
                            up.data(), dx.data(), dw.data(), eg,
                            {gs.gate.data(), gs.up.data(), gs.down.data()});
  const auto compare = [&](std::vector<double>& values, const std::vector<double>& grad,
                           double offset, const char* what) {
    constexpr double h = 1e-6;
    double biggest = 1;
    for (double g : grad) biggest = std::max(biggest, std::abs(g));
    for (size_t i = 0; i < values.size(); ++i) {
      const double keep = values[i];
      values[i] = keep + h;
      const double hi = loss();
      values[i] = keep - h;
      const double lo = loss();
      values[i] = keep;
      ASSERT_NEAR(grad[i] - offset, (hi - lo) / (2 * h), 1e-6 * biggest + 1e-8) << what << " " << i;
    }
  };
  compare(p.x, dx, 0.125, "x");
  compare(p.w, dw, 0, "w");
  for (int64_t e = 0; e < p.E; ++e) {
    compare(p.experts[e].gate, grads[e].gate, 0, "gate");
    compare(p.experts[e].up, grads[e].up, 0, "up");
    compare(p.experts[e].down, grads[e].down, 0, "down");
  }
  if (p.shared_m > 0) {
    compare(p.shared.gate, gs.gate, 0, "shared gate");
    compare(p.shared.up, gs.up, 0, "shared up");
    compare(p.shared.down, gs.down, 0, "shared down");
  }
}

TEST(MoeBackward, RoutedAndShared) { check_moe_backward(Problem(5, 4, 3, 4, 2, 5, 700)); }
TEST(MoeBackward, RoutedOnly) { check_moe_backward(Problem(4, 3, 4, 3, 1, 0, 710)); }
TEST(MoeBackward, DroppedSlots) {
  Problem p(5, 4, 3, 3, 2, 2, 720);
  p.idx[1] = p.idx[6] = p.idx[7] = -1;
  check_moe_backward(p);
}
TEST(MoeBackward, UnchosenExpertGetsZero) {
  Problem p(4, 3, 2, 3, 1, 0, 730);
  for (int32_t& e : p.idx) e = e == 2 ? 0 : e;
  check_moe_backward(p);
}

}  // namespace
}  // namespace v3b
