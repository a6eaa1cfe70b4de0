// The training step: gradients against central differences and against the reference, its three
// arithmetics against each other, AdamW, the bias update, determinism. The loop:
// test_training_loop.cpp.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <map>

#include "kernels/core/cpu.h"
#include "kernels/train/step.h"
#include "model/error.h"
#include "model/rng.h"
#include "reference/model_backward.h"
#include "scenarios/training.h"

namespace v3b {
namespace {

namespace kt = kern::train;
using kt::Arithmetic;

std::vector<int32_t> random_tokens(int64_t n, int64_t V, uint64_t seed) {
  std::vector<int32_t> t(static_cast<size_t>(n));
  for (size_t i = 0; i < t.size(); ++i) t[i] = int32_t(model::rng_below({seed, 4}, i, V));
  return t;
}

std::vector<double> grads(const kt::TrainStep& s) {
  std::vector<double> g(static_cast<size_t>(s.table().total));
  for (size_t i = 0; i < g.size(); ++i) g[i] = s.get_grad(int64_t(i));
  return g;
}
double rel_diff(const std::vector<double>& a, const std::vector<double>& b, size_t lo, size_t hi) {
  double n = 0, d = 0;
  for (size_t i = lo; i < hi; ++i) n += (a[i] - b[i]) * (a[i] - b[i]), d += b[i] * b[i];
  return d > 0 ? std::sqrt(n / d) : std::sqrt(n);
}

struct OneThread {  // tiny loops: waking a team costs more than the work
  int before = kern::num_threads();
  OneThread() { kern::set_num_threads(1); }
  ~OneThread() { kern::set_num_threads(before); }
};

struct Setting {
  kt::AuxLoss aux;
  bool q_null, yarn, routing;
};
class TrainGradients : public testing::TestWithParam<Setting> {};

model::ModelConfig micro(const Setting& s) {
  model::ModelConfig c = model::load_preset("micro");
  if (s.q_null) c.q_lora_rank = 0;
  if (s.yarn) {
    c.rope_scaling.type = model::RopeType::yarn;
    c.rope_scaling.factor = 4;
    c.rope_scaling.original_max_position_embeddings = 8;
    c.rope_scaling.mscale = 1;
    c.rope_scaling.mscale_all_dim = 0.5;
  }
  return c;
}

// float64 trainer, every tensor: a sample of elements against central differences, and all elements
// against the reference's gradient, at the arithmetic's own precision.
TEST_P(TrainGradients, CentralDifferencesAndReference) {
  const Setting s = GetParam();
  const OneThread one;
  const model::ModelConfig c = micro(s);
  constexpr int64_t B = 2, S = 10;
  const auto tokens = random_tokens(B * (S + 1), c.vocab_size, 5);
  std::vector<int32_t> targets(B * S);
  for (int64_t i = 0; i < B * S; ++i)
    targets[size_t(i)] = tokens[size_t(i / S * (S + 1) + i % S + 1)];
  targets[5] = -100;
  ref::LossOptions ro;
  ro.alpha = 0.05;
  ro.balance = s.aux == kt::AuxLoss::none       ? ref::BalanceLoss::none
               : s.aux == kt::AuxLoss::sequence ? ref::BalanceLoss::sequence
                                                : ref::BalanceLoss::switch_loss;
  if (s.routing) ro.flags.balance_f = spec::BalanceF::routing;
  // A seed whose routing decisions are far from a tie compared with the step.
  model::WeightsPtr weights;
  ref::ModelParams<double> p;
  ref::LossParts parts;
  for (uint64_t seed = 1; seed < 50; ++seed) {
    weights = model::random_weights(c, seed, spec::DType::bf16);
    p = ref::make_params<double>(*weights);
    parts = ref::model_loss<double>(p, B, S, tokens.data(), targets.data(), ro, nullptr);
    if (parts.smallest_gap > 1e-3) break;
  }
  ASSERT_GT(parts.smallest_gap, 1e-4);
  auto g = ref::zeros_like(p);
  ref::model_loss(p, B, S, tokens.data(), targets.data(), ro, &g);

  auto step = kt::make_train_step(c, Arithmetic::f64);
  scen::set_weights(*step, *weights);
  kt::LossOptions o;
  o.aux = s.aux, o.aux_alpha = 0.05, o.aux_f_from_routing = s.routing;
  const kt::Batch batch{B, S, tokens.data(), targets.data()};
  const kt::StepLosses l = step->run(batch, o, true);
  EXPECT_NEAR(l.total, parts.total, 1e-11);
  EXPECT_NEAR(l.nats, parts.nats, 1e-10);
  EXPECT_NEAR(l.mtp_nats, parts.mtp_nats, 1e-10);
  EXPECT_NEAR(l.aux, parts.aux, 1e-12);
  EXPECT_EQ(l.load, parts.load);
  const std::vector<double> ours = grads(*step);

  std::map<std::string, std::vector<double>> expected;
  ref::for_each_tensor<double>(
      g, [&](const std::string& n, std::vector<double>& v) { expected[n] = v; });
  for (const kt::Param& q : step->table().params) {
    ASSERT_TRUE(expected.count(q.name)) << q.name;
    const std::vector<double>& e = expected[q.name];
    ASSERT_EQ(int64_t(e.size()), q.numel()) << q.name;
    double scale = 1e-8;
    for (double v : e) scale = std::max(scale, std::abs(v));
    for (size_t i = 0; i < e.size(); ++i) {
      const double d = std::abs(ours[size_t(q.offset) + i] - e[i]);
      ASSERT_TRUE(d <= 1e-10 * scale + 1e-14) << q.name << "[" << i << "] " << d;
    }
    for (int k = 0; k < 3; ++k) {
      const auto at = q.offset + (q.name == "model.embed_tokens.weight"
                                      ? tokens[size_t(k)] * c.hidden_size + k
                                      : model::rng_below({3, model::rng_stream(q.name.c_str())},
                                                         uint64_t(k), q.numel()));
      const double w = step->get_param(at), h = 1e-6;
      step->set_param(at, w + h);
      const double up = step->run(batch, o, false).total;
      step->set_param(at, w - h);
      const double down = step->run(batch, o, false).total;
      step->set_param(at, w);
      const double fd = (up - down) / (2 * h), an = ours[size_t(at)];
      const double bound = 1e-6 * std::max(std::abs(fd), std::abs(an)) + 1e-8;  // SPEC 0.6
      ASSERT_TRUE(std::abs(fd - an) <= bound) << q.name << " " << fd << " " << an;
    }
  }
}
INSTANTIATE_TEST_SUITE_P(Micro, TrainGradients,
                         testing::Values(Setting{kt::AuxLoss::none, false, false, false},
                                         Setting{kt::AuxLoss::sequence, false, true, false},
                                         Setting{kt::AuxLoss::sequence, true, false, true},
                                         Setting{kt::AuxLoss::switch_loss, false, false, false}));

// Every expert is chosen, so that rounding flips no route: gradients are comparable tensor by
// tensor.
model::ModelConfig all_experts() {
  model::ModelConfig c = model::load_preset("micro");
  c.hidden_size = 64, c.qk_nope_head_dim = 32, c.qk_rope_head_dim = 16, c.v_head_dim = 32;
  c.n_routed_experts = c.num_experts_per_tok = 4;
  c.n_group = c.topk_group = 1;
  return c;
}

TEST(TrainStep, ArithmeticsAgree) {
  const model::ModelConfig c = all_experts();
  constexpr int64_t B = 3, S = 75;  // not a multiple of any block
  const auto tokens = random_tokens(B * (S + 1), c.vocab_size, 6);
  kt::LossOptions o;
  o.aux = kt::AuxLoss::sequence;
  const auto weights = model::random_weights(c, 3, spec::DType::bf16);
  std::vector<double> exact;
  double loss = 0;
  for (Arithmetic a : {Arithmetic::f64, Arithmetic::f32, Arithmetic::bf16}) {
    auto step = kt::make_train_step(c, a);
    scen::set_weights(*step, *weights);
    const auto l = step->run({B, S, tokens.data(), nullptr}, o, true);
    const std::vector<double> g = grads(*step);
    if (a == Arithmetic::f64) {
      exact = g, loss = l.total;
      continue;
    }
    // bf16: operands rounded (1.7e-3 RMS each, SPEC 0.6) in every product of two layers and the MTP
    // layer, forward and backward: about sqrt(60) independent roundings on the longest path.
    const double bound = a == Arithmetic::f32 ? 1e-5 : 3e-2;
    EXPECT_NEAR(l.total, loss, a == Arithmetic::f32 ? 1e-5 : 1e-2);
    for (const kt::Param& q : step->table().params) {
      const double d = rel_diff(g, exact, size_t(q.offset), size_t(q.offset + q.numel()));
      EXPECT_TRUE(d <= bound) << q.name << " " << d << " arithmetic " << int(a);
    }
  }
}

TEST(TrainStep, SameBitsForAnyThreadCount) {
  const model::ModelConfig c = all_experts();
  constexpr int64_t B = 5, S = 33;
  const auto tokens = random_tokens(B * (S + 1), c.vocab_size, 7);
  const int before = kern::num_threads();
  std::vector<std::vector<double>> got;
  for (int threads : {1, 2, 1}) {
    kern::set_num_threads(threads);
    auto step = kt::make_train_step(c, Arithmetic::bf16);
    std::vector<float> w(size_t(step->table().total));
    kt::init_params(step->table(), 0.05, 1, w);
    step->set_params(w);
    step->run({B, S, tokens.data(), nullptr}, {}, true);
    got.push_back(grads(*step));
  }
  kern::set_num_threads(before);
  EXPECT_EQ(got[0], got[1]);
  EXPECT_EQ(got[0], got[2]);
}

TEST(TrainStep, AdamWAndClipping) {
  const model::ModelConfig c = model::load_preset("micro");
  auto step = kt::make_train_step(c, Arithmetic::f32);
  std::vector<float> w(size_t(step->table().total));
  kt::init_params(step->table(), 0.1, 2, w);
  step->set_params(w);
  const auto tokens = random_tokens(2 * 9, c.vocab_size, 8);
  kt::AdamOptions a;
  a.lr = 0.01, a.clip = 0.25;
  std::vector<double> m(w.size()), v(w.size()), x(w.begin(), w.end());
  for (int t = 1; t <= 3; ++t) {
    step->run({2, 8, tokens.data(), nullptr}, {}, true);
    const std::vector<double> g = grads(*step);
    double norm = 0;
    for (double gi : g) norm += gi * gi;
    norm = std::sqrt(norm);
    ASSERT_GT(norm, a.clip);  // or clipping is not tested
    EXPECT_NEAR(step->adamw(a, t), norm, 1e-4 * norm);
    for (const kt::Param& p : step->table().params) {
      for (auto i = size_t(p.offset); i < size_t(p.offset + p.numel()); ++i) {
        const double gi = g[i] * a.clip / norm;
        m[i] = a.beta1 * m[i] + (1 - a.beta1) * gi;
        v[i] = a.beta2 * v[i] + (1 - a.beta2) * gi * gi;
        const double mh = m[i] / (1 - std::pow(a.beta1, t)), vh = v[i] / (1 - std::pow(a.beta2, t));
        x[i] -= a.lr * (mh / (std::sqrt(vh) + a.eps) + (p.matrix ? a.weight_decay * x[i] : 0.0));
        ASSERT_NEAR(step->get_param(int64_t(i)), x[i], 2e-5) << p.name << " step " << t;
        x[i] = step->get_param(int64_t(i));
      }
    }
  }
}

TEST(TrainStep, BiasUpdate) {
  std::vector<float> b{0.5F, 0, 0, 0};
  kt::update_bias(b, {10, 20, 30, 20}, 0.25);  // SPEC 1.18: overloaded down, sign(0) = 0
  EXPECT_EQ(b, (std::vector<float>{0.75F, 0, -0.25F, 0}));
}

TEST(TrainStep, RejectsWhatItCannotTrain) {
  model::ModelConfig c = model::load_preset("micro");
  c.num_nextn_predict_layers = 2;
  EXPECT_THROW(kt::make_param_table(c), Error);
  c = model::load_preset("micro");
  c.scoring_func = model::ScoringFunc::softmax;
  EXPECT_THROW(kt::make_param_table(c), Error);
}

// The parameter counts of SPEC 0.2.
TEST(TrainStep, ParameterCounts) {
  for (const auto& [name, count] : std::map<std::string, int64_t>{
           {"micro", 33784 + 20944}, {"train", 2305584 + 713456}, {"tiny", 6405040 + 1988016}}) {
    const model::ModelConfig c = model::load_preset(name);
    const kt::ParamTable t = kt::make_param_table(c);
    EXPECT_EQ(t.trainable + t.moe_layers * c.n_routed_experts, count) << name;
  }
}

}  // namespace
}  // namespace v3b
