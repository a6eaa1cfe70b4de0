// The whole model's analytic gradient against central differences in double, every tensor class
// (SPEC 0.6, 3), and the training loss against the forward backend.
#include <gtest/gtest.h>

#include <cmath>
#include <map>
#include <set>

#include "model/rng.h"
#include "reference/forward.h"
#include "reference/model_backward.h"
#include "tests/worst.h"

namespace v3b {
namespace {

using Params = ref::ModelParams<double>;

std::vector<int32_t> tokens(int64_t B, int64_t T, int64_t V, uint64_t seed) {
  std::vector<int32_t> t(static_cast<size_t>(B * (T + 1)));
  for (size_t i = 0; i < t.size(); ++i) t[i] = int32_t(model::rng_below({seed, 4}, i, V));
  return t;
}

struct Setting {
  const char* name;
  ref::LossOptions loss;
  void (*change)(model::ModelConfig&) = nullptr;
};
std::vector<Setting> settings() {
  std::vector<Setting> s(7);
  s[0].name = "plain";
  s[1].name = "sequence_scores";
  s[1].loss.balance = ref::BalanceLoss::sequence;
  s[1].loss.alpha = 0.3;
  s[2].name = "sequence_routing_prenorm";
  s[2].loss.balance = ref::BalanceLoss::sequence;
  s[2].loss.alpha = 0.3;
  s[2].loss.flags.balance_f = spec::BalanceF::routing;
  s[2].loss.flags.mtp_hidden = spec::MtpHidden::pre_norm;
  s[2].loss.flags.mtp_concat = spec::MtpConcat::h_emb;
  s[3].name = "switch";
  s[3].loss.balance = ref::BalanceLoss::switch_loss;
  s[3].loss.alpha = 0.3;
  s[4].name = "q_null_two_mtp";
  s[4].change = [](model::ModelConfig& c) {
    c.q_lora_rank = 0;
    c.num_nextn_predict_layers = 2;
    c.n_shared_experts = 0;
  };
  s[5].name = "softmax_greedy_yarn";
  s[5].change = [](model::ModelConfig& c) {
    c.scoring_func = model::ScoringFunc::softmax;
    c.topk_method = model::TopkMethod::greedy;
    c.n_group = c.topk_group = 1;
    c.norm_topk_prob = false;
    c.rope_scaling.type = model::RopeType::yarn;
    c.rope_scaling.factor = 4;
    c.rope_scaling.original_max_position_embeddings = 8;
    c.rope_scaling.mscale = 1;
    c.rope_scaling.mscale_all_dim = 0.5;
  };
  s[6].name = "two_mtp_pre_norm_tied";
  s[6].loss.flags.mtp_hidden = spec::MtpHidden::pre_norm;
  s[6].change = [](model::ModelConfig& c) {
    c.num_nextn_predict_layers = 2;
    c.tie_word_embeddings = true;
  };
  return s;
}

class Gradients : public testing::TestWithParam<size_t> {};

TEST_P(Gradients, CentralDifferences) {
  const Setting s = settings()[GetParam()];
  model::ModelConfig c = model::load_preset("micro");
  if (s.change != nullptr) s.change(c);
  constexpr int64_t B = 2, T = 9;
  constexpr double h = 1e-6;
  // A seed whose routing decisions are all far from a tie compared with the step.
  Params p;
  std::vector<int32_t> t;
  ref::LossParts base;
  for (uint64_t seed = 1;; ++seed) {
    ASSERT_LT(seed, 60u);
    p = ref::make_params<double>(*model::random_weights(c, seed, spec::DType::f32));
    t = tokens(B, T, c.vocab_size, seed);
    base = ref::model_loss<double>(p, B, T, t.data(), nullptr, s.loss, nullptr);
    if (base.smallest_gap > 1e-4) break;
  }
  std::vector<int32_t> y;
  for (int64_t b = 0; b < B; ++b)
    for (int64_t i = 0; i < T; ++i) y.push_back(i == 3 ? -100 : t[size_t(b * (T + 1) + i + 1)]);
  const auto loss = [&](Params* g) {
    return ref::model_loss<double>(p, B, T, t.data(), y.data(), s.loss, g);
  };
  Params g = ref::zeros_like(p);
  base = loss(&g);
  EXPECT_EQ(base.targets, B * (T - 1));
  EXPECT_GT(base.mtp_nats, 0);
  if (s.loss.balance != ref::BalanceLoss::none) {
    EXPECT_GT(base.aux, 0);
  }
  std::map<std::string, std::vector<double>*> grads;
  ref::for_each_tensor<double>(
      g, [&](const std::string& name, std::vector<double>& v) { grads[name] = &v; });
  int checked = 0, classes = 0;
  double worst = 0;
  ref::for_each_tensor<double>(p, [&](const std::string& name, std::vector<double>& v) {
    const std::vector<double>& an = *grads.at(name);
    ASSERT_EQ(an.size(), v.size()) << name;
    if (name.ends_with("e_score_correction_bias")) {
      for (double x : an) EXPECT_EQ(x, 0) << name;  // selection only
      return;
    }
    ++classes;
    // The largest analytic entry and some drawn ones.
    std::set<size_t> where;
    size_t largest = 0;
    for (size_t i = 0; i < an.size(); ++i)
      if (std::abs(an[i]) > std::abs(an[largest])) largest = i;
    where.insert(largest);
    const bool expert = name.find(".experts.") != std::string::npos;
    for (uint64_t k = 0; k < (expert ? 2u : 5u); ++k)
      where.insert(
          size_t(model::rng_below({k, model::rng_stream(name.c_str())}, k, int64_t(v.size()))));
    for (size_t i : where) {
      const double keep = v[i];
      v[i] = keep + h;
      const double up = loss(nullptr).total;
      v[i] = keep - h;
      const double down = loss(nullptr).total;
      v[i] = keep;
      const double numeric = (up - down) / (2 * h);
      // SPEC 0.6: 1e-6 relative plus 1e-8; the difference of two losses of ~5 carries 5 * 2^-52 /
      // 1e-6 = 1e-9.
      const double bound = 1e-6 * std::max(std::abs(numeric), std::abs(an[i])) + 1e-8;
      EXPECT_TRUE(std::abs(numeric - an[i]) <= bound)
          << name << "[" << i << "] numeric " << numeric << " analytic " << an[i];
      worst = worse(worst, std::abs(numeric - an[i]) / bound);
      ++checked;
    }
  });
  std::printf("gradients %-26s %d tensors, %d entries, worst error/bound %.2g\n", s.name, classes,
              checked, worst);
  EXPECT_GT(checked, 100);
}
INSTANTIATE_TEST_SUITE_P(Settings, Gradients, testing::Range<size_t>(0, 7),
                         [](const auto& info) { return std::string(settings()[info.param].name); });

// A gradient that is forgotten shows as zeros: every matrix that a token passes must have some.
TEST(Gradients, NothingIsForgotten) {
  const model::ModelConfig c = model::load_preset("micro");
  Params p = ref::make_params<double>(*model::random_weights(c, 3, spec::DType::f32));
  Params g = ref::zeros_like(p);
  const auto t = tokens(4, 16, c.vocab_size, 3);
  const ref::LossParts r = ref::model_loss<double>(p, 4, 16, t.data(), nullptr, {}, &g);
  ASSERT_EQ(r.load.size(), 2u);
  ref::for_each_tensor<double>(g, [&](const std::string& name, std::vector<double>& v) {
    if (name.ends_with("bias")) return;
    double n = 0;
    for (double x : v) n += x * x;
    const size_t at = name.find(".experts.");
    if (at != std::string::npos) {
      const size_t layer = name.find("layers.1.") != std::string::npos ? 0 : 1;
      const size_t e = size_t(std::stoi(name.substr(at + 9)));
      EXPECT_EQ(n > 0, r.load[layer][e] > 0) << name;
      return;
    }
    EXPECT_GT(n, 0) << name;
  });
}

// The losses are those of the forward backend's logits.
TEST(Gradients, LossEqualsTheForwardPass) {
  const model::ModelConfig c = model::load_preset("micro");
  const auto w = model::random_weights(c, 6, spec::DType::f32);
  constexpr int64_t T = 12;
  const auto t = tokens(1, T, c.vocab_size, 6);
  const auto r =
      ref::model_loss<double>(ref::make_params<double>(*w), 1, T, t.data(), nullptr, {}, nullptr);
  auto b = ref::make_reference_backend<double>(w);
  auto seq = b->new_sequence();
  const model::ForwardOptions all{model::LogitsOf::all, true};
  const auto main = b->forward(*seq, std::span(t).first(T), all);
  const auto mtp =
      b->mtp_forward(*seq, std::span(t).subspan(1, T - 1),
                     std::span(main.hidden).first(size_t((T - 1) * c.hidden_size)), all);
  const auto nats = [&](const std::vector<float>& z, int64_t rows, int64_t shift) {
    double sum = 0;
    for (int64_t i = 0; i < rows; ++i) {
      double total = 0;
      for (int64_t v = 0; v < c.vocab_size; ++v)
        total += std::exp(double(z[size_t(i * c.vocab_size + v)]));
      sum += std::log(total) - z[size_t(i * c.vocab_size + t[size_t(i + shift)])];
    }
    return sum;
  };
  EXPECT_NEAR(r.nats, nats(main.logits, T, 1), 1e-5);
  EXPECT_NEAR(r.mtp_nats, nats(mtp.logits, T - 1, 2), 1e-5);
  EXPECT_NEAR(r.total, (r.nats + 0.3 * r.mtp_nats) / double(T), 1e-12);
}

}  // namespace
}  // namespace v3b
