// Parallel prediction heads (SPEC 1.26): targets, independence, gradients against central
// differences, and the model whose last layer is head 1.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <map>
#include <set>

#include "model/error.h"
#include "model/rng.h"
#include "reference/layer_backward.h"
#include "reference/parallel_heads.h"
#include "tests/worst.h"

namespace v3b {
namespace {

using Params = ref::ModelParams<double>;
using Rows = ref::RowMatrix<double>;
constexpr int64_t kBatch = 2, kLength = 7;

// n heads out of a random model of n layers without MTP; the first `dense` are dense, the others
// MoE.
Params heads(int64_t n, int64_t dense, uint64_t seed, bool tied = false) {
  model::ModelConfig c = model::load_preset("micro");
  c.num_hidden_layers = n;
  c.first_k_dense_replace = dense;
  c.num_nextn_predict_layers = 0;
  c.tie_word_embeddings = tied;
  Params p = ref::make_params<double>(*model::random_weights(c, seed, spec::DType::f32));
  return p;
}
std::vector<double> normals(int64_t n, uint64_t seed) {
  std::vector<double> v(static_cast<size_t>(n));
  for (size_t i = 0; i < v.size(); ++i) v[i] = model::rng_normal({seed, 8}, i);
  return v;
}
std::vector<int32_t> tokens(int64_t V, uint64_t seed) {
  std::vector<int32_t> t(static_cast<size_t>(kBatch * (kLength + 1)));
  for (size_t i = 0; i < t.size(); ++i) t[i] = int32_t(model::rng_below({seed, 4}, i, V));
  return t;
}
// Nats of one row of logits at `y`, in the plainest form.
double nats(const std::vector<double>& z, int64_t row, int64_t V, int32_t y) {
  double sum = 0;
  for (int64_t v = 0; v < V; ++v) sum += std::exp(z[size_t(row * V + v)]);
  return std::log(sum) - z[size_t(row * V + y)];
}

// Each head's logits at position q against x_{q+i}, and no target beyond the sequence's end.
TEST(ParallelHeads, TargetsAndTotal) {
  const Params p = heads(4, 2, 1);
  const int64_t V = p.config.vocab_size;
  const auto z = normals(kBatch * kLength * p.config.hidden_size, 1);
  const auto t = tokens(V, 1);
  const auto r = ref::parallel_heads_loss<double>(p, kBatch, kLength, z.data(), t.data(), nullptr,
                                                  {}, nullptr, nullptr);
  ASSERT_EQ(r.nats.size(), 4u);
  EXPECT_EQ(r.targets, kBatch * kLength);
  double total = 0;
  for (int64_t i = 1; i <= 4; ++i) {
    const auto y = ref::parallel_head_logits<double>(p, i, kBatch, kLength, z.data());
    double sum = 0;
    int64_t count = 0;
    for (int64_t b = 0; b < kBatch; ++b)
      for (int64_t q = 0; q + i <= kLength; ++q, ++count)
        sum += nats(y, b * kLength + q, V, t[size_t(b * (kLength + 1) + q + i)]);
    EXPECT_EQ(r.counts[size_t(i - 1)], count);
    EXPECT_NEAR(r.nats[size_t(i - 1)], sum, 1e-11 * sum) << i;
    total += sum;
  }
  EXPECT_NEAR(r.total, total / double(kBatch * kLength), 1e-12);
  ASSERT_EQ(r.load.size(), 2u);
  for (const auto& load : r.load) {
    int64_t sum = 0;
    for (int64_t x : load) sum += x;
    EXPECT_EQ(sum, kBatch * kLength * p.config.num_experts_per_tok);
  }
}

// One head that is a model's last layer: loss and every gradient are those of the ordinary model,
// d z carried through the trunk included.
TEST(ParallelHeads, OneHeadIsTheOrdinaryNextTokenLoss) {
  const Params whole = heads(3, 1, 2);
  const int64_t d = whole.config.hidden_size, N = kBatch * kLength;
  const auto t = tokens(whole.config.vocab_size, 2);
  ref::LossOptions o;
  o.balance = ref::BalanceLoss::sequence;
  o.alpha = 0.3;
  Params expected = ref::zeros_like(whole);
  const auto e = ref::model_loss<double>(whole, kBatch, kLength, t.data(), nullptr, o, &expected);

  Params p = whole;
  p.layers.assign(1, whole.layers[2]);
  Params g = ref::zeros_like(p);
  Rows h(N, d), dz = Rows::Zero(N, d);
  for (int64_t r = 0; r < N; ++r)
    for (int64_t i = 0; i < d; ++i)
      h(r, i) = whole.embed[size_t(t[size_t(r / kLength * (kLength + 1) + r % kLength)] * d + i)];
  ref::LayerActs<double> a0, a1;
  h = ref::layer_forward<double>(whole.config, whole.layers[0], kBatch, kLength, o, h, a0);
  h = ref::layer_forward<double>(whole.config, whole.layers[1], kBatch, kLength, o, h, a1);
  const auto r = ref::parallel_heads_loss<double>(p, kBatch, kLength, h.data(), t.data(), nullptr,
                                                  o, &g, dz.data());
  EXPECT_EQ(r.nats[0], e.nats);
  EXPECT_EQ(r.targets, e.targets);
  EXPECT_NEAR(r.total + a1.aux, e.total, 1e-13);
  EXPECT_EQ(g.norm, expected.norm);
  EXPECT_EQ(g.head, expected.head);
  EXPECT_EQ(g.layers[0].kv_b, expected.layers[2].kv_b);
  EXPECT_EQ(g.layers[0].router, expected.layers[2].router);
  // Down the trunk.
  Params trunk = ref::zeros_like(whole);
  dz = ref::layer_backward<double>(whole.config, whole.layers[1], kBatch, kLength, o, a1, dz,
                                   trunk.layers[1]);
  dz = ref::layer_backward<double>(whole.config, whole.layers[0], kBatch, kLength, o, a0, dz,
                                   trunk.layers[0]);
  EXPECT_EQ(trunk.layers[0].input_norm, expected.layers[0].input_norm);
  EXPECT_EQ(trunk.layers[1].o, expected.layers[1].o);
  double size = 0;
  for (double v : trunk.layers[0].input_norm) size += v * v;
  EXPECT_GT(size, 0);
}

// No conditioning between heads, and none of a position on later ones.
TEST(ParallelHeads, HeadsAreIndependentAndCausal) {
  Params p = heads(3, 1, 3);
  const int64_t d = p.config.hidden_size, V = p.config.vocab_size;
  auto z = normals(kBatch * kLength * d, 3);
  std::vector<std::vector<double>> before;
  for (int64_t i = 1; i <= 3; ++i)
    before.push_back(ref::parallel_head_logits<double>(p, i, kBatch, kLength, z.data()));
  EXPECT_NE(before[0], before[1]);
  for (size_t j = 0; j < 3; ++j) {
    Params q = p;
    for (double& x : q.layers[j].o) x *= 1.5;
    for (double& x : q.layers[j].input_norm) x += 0.25;
    for (int64_t i = 1; i <= 3; ++i) {
      const auto y = ref::parallel_head_logits<double>(q, i, kBatch, kLength, z.data());
      EXPECT_EQ(y == before[size_t(i - 1)], size_t(i - 1) != j) << "head " << i << " changed " << j;
    }
  }
  const int64_t from = kLength - 2;  // of the first sequence
  for (int64_t i = 0; i < d; ++i) z[size_t(from * d + i)] += 1;
  for (int64_t i = 1; i <= 3; ++i) {
    const auto y = ref::parallel_head_logits<double>(p, i, kBatch, kLength, z.data());
    for (int64_t r = 0; r < kBatch * kLength; ++r) {
      double change = 0;
      for (int64_t v = r * V; v < (r + 1) * V; ++v)
        change = std::max(change, std::abs(y[size_t(v)] - before[size_t(i - 1)][size_t(v)]));
      // The dense head (1) bit by bit; in the MoE heads the changed tokens may go to other experts,
      // and a product over another number of rows rounds differently.
      const bool later = r >= from && r < kLength;
      EXPECT_TRUE(later ? change > 1e-6 : change <= (i == 1 ? 0 : 1e-13))
          << "head " << i << " row " << r << " changed by " << change;
    }
  }
}

// The trunk's gradient is the sum of what each head alone gives, and so is the shared norm's.
TEST(ParallelHeads, TrunkGradientIsTheSumOfTheHeads) {
  const Params p = heads(3, 1, 4);
  const int64_t N = kBatch * kLength * p.config.hidden_size;
  const auto z = normals(N, 4);
  const auto t = tokens(p.config.vocab_size, 4);
  Params g = ref::zeros_like(p);
  std::vector<double> dz(static_cast<size_t>(N), 0.0), sum(dz);
  (void)ref::parallel_heads_loss<double>(p, kBatch, kLength, z.data(), t.data(), nullptr, {}, &g,
                                         dz.data());
  std::vector<double> norm(g.norm.size(), 0.0);
  for (int64_t i = 1; i <= 3; ++i) {
    // Alone as head 1, with the labels that head i has; the division is by all labels of head 1.
    Params one = p;
    one.layers.assign(1, p.layers[size_t(i - 1)]);
    Params go = ref::zeros_like(one);
    std::vector<int32_t> y;
    for (int64_t b = 0; b < kBatch; ++b)
      for (int64_t q = 0; q < kLength; ++q)
        y.push_back(q + i <= kLength ? t[size_t(b * (kLength + 1) + q + i)] : -100);
    std::vector<double> alone(static_cast<size_t>(N), 0.0);
    const auto r = ref::parallel_heads_loss<double>(one, kBatch, kLength, z.data(), t.data(),
                                                    y.data(), {}, &go, alone.data());
    const double scale = double(r.targets) / double(kBatch * kLength);
    double size = 0;
    for (size_t k = 0; k < sum.size(); ++k) {
      sum[k] += scale * alone[k];
      size += alone[k] * alone[k];
    }
    for (size_t k = 0; k < norm.size(); ++k) norm[k] += scale * go.norm[k];
    EXPECT_GT(size, 0) << i;
  }
  for (size_t k = 0; k < sum.size(); ++k) EXPECT_NEAR(dz[k], sum[k], 1e-13) << k;
  for (size_t k = 0; k < norm.size(); ++k) EXPECT_NEAR(g.norm[k], norm[k], 1e-13) << k;
}

void check_gradients(int64_t n, int64_t dense, bool tied, const ref::LossOptions& o) {
  constexpr double h = 1e-6;
  Params p;
  std::vector<double> z;
  std::vector<int32_t> t;
  ref::ParallelHeadsLoss base;
  for (uint64_t seed = 1;; ++seed) {  // one whose routing decisions are far from a tie
    ASSERT_LT(seed, 60u);
    p = heads(n, dense, seed, tied);
    z = normals(kBatch * kLength * p.config.hidden_size, seed);
    t = tokens(p.config.vocab_size, seed);
    base = ref::parallel_heads_loss<double>(p, kBatch, kLength, z.data(), t.data(), nullptr, o,
                                            nullptr, nullptr);
    if (base.smallest_gap > 1e-4) break;
  }
  std::vector<int32_t> y;  // one label ignored in each sequence
  for (int64_t b = 0; b < kBatch; ++b)
    for (int64_t q = 0; q < kLength; ++q)
      y.push_back(q == 3 ? -100 : t[size_t(b * (kLength + 1) + q + 1)]);
  const auto loss = [&](Params* g, double* dz) {
    return ref::parallel_heads_loss<double>(p, kBatch, kLength, z.data(), t.data(), y.data(), o, g,
                                            dz);
  };
  Params g = ref::zeros_like(p);
  std::vector<double> dz(z.size(), 0.0);
  base = loss(&g, dz.data());
  EXPECT_EQ(base.targets, kBatch * (kLength - 1));
  double worst = 0;
  int checked = 0;
  const auto check = [&](const std::string& name, std::vector<double>& v,
                         const std::vector<double>& an, uint64_t draws) {
    std::set<size_t> where;
    size_t largest = 0;
    for (size_t i = 0; i < an.size(); ++i)
      if (std::abs(an[i]) > std::abs(an[largest])) largest = i;
    where.insert(largest);
    for (uint64_t k = 0; k < draws; ++k)
      where.insert(
          size_t(model::rng_below({k, model::rng_stream(name.c_str())}, k, int64_t(v.size()))));
    for (size_t i : where) {
      const double keep = v[i];
      v[i] = keep + h;
      const double up = loss(nullptr, nullptr).total;
      v[i] = keep - h;
      const double down = loss(nullptr, nullptr).total;
      v[i] = keep;
      const double numeric = (up - down) / (2 * h);
      // SPEC 0.6, as in test_gradients.
      const double bound = 1e-6 * std::max(std::abs(numeric), std::abs(an[i])) + 1e-8;
      EXPECT_TRUE(std::abs(numeric - an[i]) <= bound)
          << name << "[" << i << "] numeric " << numeric << " analytic " << an[i];
      worst = worse(worst, std::abs(numeric - an[i]) / bound);
      ++checked;
    }
  };
  check("z", z, dz, 40);
  std::map<std::string, std::vector<double>*> grads;
  ref::for_each_tensor<double>(
      g, [&](const std::string& name, std::vector<double>& v) { grads[name] = &v; });
  ref::for_each_tensor<double>(p, [&](const std::string& name, std::vector<double>& v) {
    const std::vector<double>& an = *grads.at(name);
    const bool unused = name.ends_with("e_score_correction_bias") ||
                        (!tied && name.find("embed_tokens") != std::string::npos);
    if (unused) {
      for (double x : an) EXPECT_EQ(x, 0) << name;
      return;
    }
    check(name, v, an, name.find(".experts.") != std::string::npos ? 1 : 3);
  });
  std::printf("parallel heads n %d: %d entries, worst error/bound %.2g\n", int(n), checked, worst);
  EXPECT_GT(checked, 80);
}
TEST(ParallelHeads, GradientsOfFourDenseHeads) { check_gradients(4, 4, false, {}); }
TEST(ParallelHeads, GradientsOfMoeHeadsTiedWithBalanceLoss) {
  ref::LossOptions o;
  o.balance = ref::BalanceLoss::sequence;
  o.alpha = 0.3;
  check_gradients(3, 1, true, o);
}

TEST(ParallelHeads, RejectsBadShapes) {
  Params p = heads(3, 1, 5);
  const auto z = normals(kBatch * kLength * p.config.hidden_size, 5);
  const auto t = tokens(p.config.vocab_size, 5);
  Params g = ref::zeros_like(p);
  EXPECT_THROW(ref::parallel_head_logits<double>(p, 0, kBatch, kLength, z.data()), Error);
  EXPECT_THROW(ref::parallel_head_logits<double>(p, 4, kBatch, kLength, z.data()), Error);
  EXPECT_THROW(
      ref::parallel_heads_loss<double>(p, 1, 2, z.data(), t.data(), nullptr, {}, nullptr, nullptr),
      Error);
  EXPECT_THROW(ref::parallel_heads_loss<double>(p, kBatch, kLength, z.data(), t.data(), nullptr, {},
                                                &g, nullptr),
               Error);
}

}  // namespace
}  // namespace v3b
