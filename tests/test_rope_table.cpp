// RoPE frequencies and tables: SPEC 1.3, 1.4, Appendix A, identities, and transformers' own tables
// (tests/goldens/rope_tables.json, written by scripts/make_goldens.py).
#include <gtest/gtest.h>

#include <cmath>
#include <fstream>
#include <nlohmann/json.hpp>

#include "model/rope_table.h"
#include "tests/worst.h"

using namespace v3b;
using namespace v3b::model;
using spec::Flags;

namespace {

ModelConfig with(RopeType type, double factor, int64_t original = 4096) {
  ModelConfig c = load_preset("v3");
  c.rope_scaling = {};
  c.rope_scaling.type = type;
  c.rope_scaling.factor = factor;
  c.rope_scaling.original_max_position_embeddings = original;
  return c;
}
double theta(int i) { return std::pow(10000.0, -2.0 * i / 64); }

void expect_rel(const std::vector<double>& got, const std::vector<double>& want, double tol) {
  ASSERT_EQ(got.size(), want.size());
  for (size_t i = 0; i < got.size(); ++i) EXPECT_NEAR(got[i] / want[i], 1, tol) << "pair " << i;
}

}  // namespace

TEST(RopeFreqs, YarnV3Golden) {
  const std::vector<double> want = {1,
                                    7.498942093e-1,
                                    5.623413252e-1,
                                    4.216965034e-1,
                                    3.162277660e-1,
                                    2.371373706e-1,
                                    1.778279410e-1,
                                    1.333521432e-1,
                                    1e-1,
                                    7.498942093e-2,
                                    5.623413252e-2,
                                    3.900692657e-2,
                                    2.687936011e-2,
                                    1.837814622e-2,
                                    1.244795587e-2,
                                    8.334508951e-3,
                                    5.5e-3,
                                    3.561997494e-3,
                                    2.249365301e-3,
                                    1.370513636e-3,
                                    7.905694150e-4,
                                    4.149903985e-4,
                                    1.778279410e-4,
                                    3.333803580e-5,
                                    2.5e-5,
                                    1.874735523e-5,
                                    1.405853313e-5,
                                    1.054241259e-5,
                                    7.905694150e-6,
                                    5.928434264e-6,
                                    4.445698525e-6,
                                    3.333803580e-6};
  const RopeFreqs f = rope_freqs(load_preset("v3"), {}, 1);
  expect_rel(f.inv_freq, want, 1e-9);
  EXPECT_EQ(f.cos_sin_multiplier, 1);
  EXPECT_NEAR(f.softmax_scale, 0.1352337788608801, 1e-15);
  EXPECT_NEAR(rope_freqs(load_preset("v2-lite"), {}, 1).softmax_scale, 0.1147213867929261, 1e-15);
  EXPECT_NEAR(rope_freqs(load_preset("moonlight"), {}, 1).softmax_scale, 1 / std::sqrt(192.0),
              1e-16);
}

TEST(RopeFreqs,
     YarnCorners) {  // pairs 0-10 unchanged, 23-31 divided by 40, strictly between elsewhere
  const RopeFreqs f = rope_freqs(load_preset("v3"), {}, 1);
  for (int i = 0; i < 32; ++i) {
    const double ratio = f.inv_freq[static_cast<size_t>(i)] / theta(i);
    if (i <= 10)
      EXPECT_NEAR(ratio, 1, 1e-14) << i;
    else if (i >= 23)
      EXPECT_NEAR(ratio, 1 / 40.0, 1e-15) << i;
    else
      EXPECT_TRUE(ratio < 1 - 1e-3 && ratio > 1 / 40.0 + 1e-3) << i;
  }
}

TEST(RopeFreqs, PaperRampDiffers) {  // SPEC 1.4.5: ratio 0.234 at i = 20
  Flags paper;
  paper.yarn_ramp = spec::YarnRamp::paper;
  const RopeFreqs a = rope_freqs(load_preset("v3"), paper, 1),
                  b = rope_freqs(load_preset("v3"), {}, 1);
  EXPECT_NEAR(a.inv_freq[20] / b.inv_freq[20], 0.234, 0.0005);
  double worst = 1;
  for (size_t i = 0; i < 32; ++i) worst = std::min(worst, a.inv_freq[i] / b.inv_freq[i]);
  EXPECT_NEAR(1 / worst, 4.3, 0.05);
  // The paper ramp with YaRN is NTK-by-parts' frequencies.
  const RopeFreqs parts = rope_freqs(with(RopeType::ntk_by_parts, 40), {}, 1);
  expect_rel(parts.inv_freq, a.inv_freq, 1e-15);
  EXPECT_EQ(parts.cos_sin_multiplier, 1);
  EXPECT_EQ(parts.softmax_scale, 1 / std::sqrt(192.0));
  // And its definition, by rotations inside L.
  for (int i = 0; i < 32; ++i) {
    const double r = 4096 * theta(i) / (2 * M_PI);
    const double gamma = r < 1 ? 0 : r > 32 ? 1 : (r - 1) / 31;
    EXPECT_NEAR(
        parts.inv_freq[static_cast<size_t>(i)] / ((1 - gamma) * theta(i) / 40 + gamma * theta(i)),
        1, 1e-13);
  }
}

TEST(RopeFreqs, NtkGolden) {
  const RopeFreqs f = rope_freqs(with(RopeType::ntk, 40), {}, 1);
  EXPECT_NEAR(std::pow(f.inv_freq[1], -32.0), 450546.2153, 1e-4 * 1);  // base' = theta'_1^(-d_r/2)
  EXPECT_NEAR(f.inv_freq[31], 3.33380358e-6, 1e-14);
  EXPECT_NEAR(f.inv_freq[31] / (theta(31) / 40), 1, 1e-13);
  EXPECT_EQ(f.inv_freq[0], 1);
  for (int i = 0; i < 32; ++i)
    EXPECT_NEAR(f.inv_freq[static_cast<size_t>(i)] / (theta(i) * std::pow(40.0, -2.0 * i / 62)), 1,
                1e-13)
        << i;
}

TEST(RopeFreqs, DynamicNtkGolden) {
  auto base = [](const RopeFreqs& f) { return std::pow(f.inv_freq[1], -32.0); };
  EXPECT_NEAR(base(rope_freqs(with(RopeType::dynamic, 1), {}, 8192)), 20452.2287, 1e-4);
  EXPECT_NEAR(base(rope_freqs(with(RopeType::dynamic, 40), {}, 8192)), 462177.8654, 1e-4);
  for (const int64_t l : {1, 100, 4096})
    EXPECT_NEAR(base(rope_freqs(with(RopeType::dynamic, 40), {}, l)), 1e4, 1e-7);
  // factor 1 is the paper's form: NTK with s = l/L.
  for (const int64_t l : {4097, 6000, 16384})
    expect_rel(rope_freqs(with(RopeType::dynamic, 1), {}, l).inv_freq,
               rope_freqs(with(RopeType::ntk, static_cast<double>(l) / 4096), {}, 1).inv_freq,
               1e-14);
  // Original context not given: max_position_embeddings takes its place.
  ModelConfig c = with(RopeType::dynamic, 2, 0);
  c.max_position_embeddings = 512;
  expect_rel(rope_freqs(c, {}, 1024).inv_freq,
             rope_freqs(with(RopeType::dynamic, 2, 512), {}, 1024).inv_freq, 1e-15);
}

TEST(RopeFreqs, TemperatureGolden) {  // SPEC Appendix A: get(s,1) and its square
  const double golden[][3] = {{2, 1.0693147, 1.1434340},  {4, 1.1386294, 1.2964770},
                              {8, 1.2079442, 1.4591291},  {16, 1.2772589, 1.6313902},
                              {32, 1.3465736, 1.8132604}, {40, 1.3688879, 1.8738542}};
  for (const auto& g : golden) {
    EXPECT_NEAR(yarn_get_mscale(g[0], 1), g[1], 5e-8);
    ModelConfig c = with(RopeType::yarn, g[0]);  // no mscale: original YaRN, on cos and sin
    RopeFreqs f = rope_freqs(c, {}, 1);
    EXPECT_NEAR(f.cos_sin_multiplier, g[1], 5e-8);
    EXPECT_NEAR(f.softmax_scale, 1 / std::sqrt(192.0), 1e-16);
    c.rope_scaling.mscale = c.rope_scaling.mscale_all_dim = 1;  // DeepSeek: on the whole logit
    f = rope_freqs(c, {}, 1);
    EXPECT_EQ(f.cos_sin_multiplier, 1);
    EXPECT_NEAR(f.softmax_scale * std::sqrt(192.0), g[2], 1e-7);
    c.rope_scaling.mscale = 0.5;  // both forms at once
    f = rope_freqs(c, {}, 1);
    EXPECT_NEAR(f.cos_sin_multiplier, (0.05 * std::log(g[0]) + 1) / g[1], 1e-7);
    EXPECT_NEAR(f.softmax_scale * std::sqrt(192.0), g[2], 1e-7);
    c.rope_scaling.attention_factor = 1.25;  // explicit multiplier wins on cos and sin only
    f = rope_freqs(c, {}, 1);
    EXPECT_EQ(f.cos_sin_multiplier, 1.25);
    EXPECT_NEAR(f.softmax_scale * std::sqrt(192.0), g[2], 1e-7);
    const std::vector<double> freqs = f.inv_freq;
    c.rope_scaling.temperature = false;  // the knob leaves the frequencies alone
    f = rope_freqs(c, {}, 1);
    EXPECT_EQ(f.cos_sin_multiplier, 1);
    EXPECT_EQ(f.softmax_scale, 1 / std::sqrt(192.0));
    EXPECT_EQ(f.inv_freq, freqs);
  }
  EXPECT_EQ(yarn_get_mscale(1, 1), 1);
  EXPECT_EQ(yarn_get_mscale(0.5, 1), 1);
  EXPECT_NEAR(yarn_get_mscale(40, 0.707), 1.2608037774, 1e-10);
}

TEST(RopeFreqs, ScaleOneIsPlainRope) {
  const RopeFreqs plain = rope_freqs(with(RopeType::none, 1), {}, 1);
  for (int i = 0; i < 32; ++i) EXPECT_NEAR(plain.inv_freq[static_cast<size_t>(i)], theta(i), 1e-16);
  EXPECT_EQ(plain.softmax_scale, 1 / std::sqrt(192.0));
  for (const RopeType t :
       {RopeType::linear, RopeType::ntk, RopeType::dynamic, RopeType::ntk_by_parts, RopeType::yarn})
    for (const auto ramp : {spec::YarnRamp::index, spec::YarnRamp::paper}) {
      Flags flags;
      flags.yarn_ramp = ramp;
      ModelConfig c = with(t, 1);
      c.rope_scaling.mscale = c.rope_scaling.mscale_all_dim = 1;
      const RopeFreqs f = rope_freqs(c, flags, 4096);
      expect_rel(f.inv_freq, plain.inv_freq, 1e-15);
      EXPECT_EQ(f.cos_sin_multiplier, 1);
      EXPECT_EQ(f.softmax_scale, plain.softmax_scale);
    }
}

TEST(RopeFreqs, YarnWhen) {
  Flags flags;
  flags.yarn_when = spec::YarnWhen::only_if_ctx_gt_orig;
  const ModelConfig c = load_preset("v3");
  const RopeFreqs plain = rope_freqs(with(RopeType::none, 1), {}, 1),
                  always = rope_freqs(c, {}, 4096);
  const RopeFreqs at = rope_freqs(c, flags, 4096), above = rope_freqs(c, flags, 4097);
  EXPECT_EQ(at.inv_freq, plain.inv_freq);
  EXPECT_EQ(at.softmax_scale, plain.softmax_scale);
  EXPECT_EQ(above.inv_freq, always.inv_freq);
  EXPECT_EQ(above.softmax_scale, always.softmax_scale);
}

TEST(RopeFreqs, DynamicYarn) {  // SPEC 1.4: recompute 5 and 6 with s = l/L when l > L
  ModelConfig c = with(RopeType::yarn, 40);
  c.rope_scaling.dynamic = true;
  const RopeFreqs at = rope_freqs(c, {}, 4096);
  expect_rel(at.inv_freq, rope_freqs(with(RopeType::none, 1), {}, 1).inv_freq, 1e-15);
  EXPECT_EQ(at.cos_sin_multiplier, 1);
  const RopeFreqs far = rope_freqs(c, {}, 16384), four = rope_freqs(with(RopeType::yarn, 4), {}, 1);
  expect_rel(far.inv_freq, four.inv_freq, 1e-15);
  EXPECT_NEAR(far.cos_sin_multiplier, four.cos_sin_multiplier, 1e-15);
}

TEST(RopeFreqs, EqualBetasAreFinite) {  // Kimi-K2
  for (const auto ramp : {spec::YarnRamp::index, spec::YarnRamp::paper}) {
    Flags flags;
    flags.yarn_ramp = ramp;
    const RopeFreqs f = rope_freqs(load_preset("kimi-k2"), flags, 1);
    for (int i = 0; i < 32; ++i) {
      const double ratio = f.inv_freq[static_cast<size_t>(i)] * std::pow(50000.0, i / 32.0);
      EXPECT_TRUE(ratio <= 1 + 1e-12 && ratio >= 1 / 32.0 - 1e-12) << i;
    }
    EXPECT_NEAR(f.inv_freq[31] * std::pow(50000.0, 31 / 32.0), 1 / 32.0, 1e-12);
  }
}

TEST(RopeTable, PositionInterpolation) {  // PI(s) at position s*p equals plain RoPE at p
  const RopeFreqs pi = rope_freqs(with(RopeType::linear, 4), {}, 1),
                  plain = rope_freqs(with(RopeType::none, 1), {}, 1);
  const RopeTable a = make_rope_table(pi, 0, 401), b = make_rope_table(plain, 0, 101);
  for (int64_t p = 0; p <= 100; ++p)
    for (int64_t i = 0; i < 32; ++i) {
      const auto at = static_cast<size_t>(4 * p * 32 + i), bt = static_cast<size_t>(p * 32 + i);
      ASSERT_EQ(a.cos[at], b.cos[bt]) << p << " " << i;  // the division by 4 is exact
      ASSERT_EQ(a.sin[at], b.sin[bt]) << p << " " << i;
    }
}

TEST(RopeTable, GoldenRotation) {  // (1,0) at p = 5
  const RopeTable t = make_rope_table(rope_freqs(load_preset("v3"), {}, 1), 5, 1);
  EXPECT_NEAR(t.cos[0], 0.2836621855, 3e-8);
  EXPECT_NEAR(t.sin[0], -0.9589242747, 6e-8);
  EXPECT_NEAR(t.cos[16], 0.9996218988, 6e-8);
  EXPECT_NEAR(t.sin[16], 0.0274965340, 2e-9);
}

TEST(RopeTable, RoundedOnceFromDouble) {
  const RopeFreqs f = rope_freqs(load_preset("v3"), {}, 1);
  const RopeTable t = make_rope_table(f, 163000, 840);
  EXPECT_EQ(t.positions, 840);
  EXPECT_EQ(t.half, 32);
  for (int64_t p = 0; p < 840; ++p)
    for (int64_t i = 0; i < 32; ++i) {
      const auto at = static_cast<size_t>(p * 32 + i);
      const double angle = static_cast<double>(163000 + p) * f.inv_freq[static_cast<size_t>(i)];
      ASSERT_NEAR(t.cos[at], std::cos(angle), 3.1e-8);
      ASSERT_NEAR(t.sin[at], std::sin(angle), 3.1e-8);
      ASSERT_NEAR(t.cos[at] * t.cos[at] + t.sin[at] * t.sin[at], 1, 2.5e-7);
    }
  // The multiplier is inside the table.
  const RopeFreqs y = rope_freqs(with(RopeType::yarn, 40), {}, 1);
  const RopeTable m = make_rope_table(y, 0, 3);
  EXPECT_EQ(m.cos[0], static_cast<float>(y.cos_sin_multiplier));
  EXPECT_EQ(m.sin[0], 0.0f);
  // Position 0 is the identity.
  EXPECT_EQ(make_rope_table(f, 0, 1).cos[31], 1.0f);
  EXPECT_EQ(make_rope_table(f, 0, 1).sin[31], 0.0f);
}

TEST(RopeGoldens, TransformersTables) {
  std::ifstream in(V3B_SOURCE_DIR "/tests/goldens/rope_tables.json");
  ASSERT_TRUE(in) << "tests/goldens/rope_tables.json is part of the repository";
  const nlohmann::json goldens = nlohmann::json::parse(in);
  ASSERT_GE(goldens["tables"].size(), 30u);
  double worst = 0;
  for (const nlohmann::json& t : goldens["tables"]) {
    SCOPED_TRACE(t["name"].get<std::string>());
    nlohmann::json j = nlohmann::json::parse(config_to_json(load_preset("tiny")));
    j.erase("rope_theta");
    j.erase("rope_scaling");
    j["rope_parameters"] = t["rope_parameters"];
    j["qk_rope_head_dim"] = t["dim"];
    j["max_position_embeddings"] = t["max_position_embeddings"];
    const ModelConfig c = parse_config(j.dump(), "golden");
    const int64_t context = t["seq_len"].is_null() ? 1 : t["seq_len"].get<int64_t>();
    const RopeFreqs f = rope_freqs(c, {}, context);
    const auto want = t["inv_freq"].get<std::vector<double>>();
    expect_rel(f.inv_freq, want, 1e-14);
    for (size_t i = 0; i < want.size(); ++i)
      worst = worse(worst, std::fabs(f.inv_freq[i] / want[i] - 1));
    EXPECT_NEAR(f.cos_sin_multiplier, t["attention_factor"].get<double>(), 1e-15);
    const double multiplier = f.softmax_scale * std::sqrt(static_cast<double>(c.qk_head_dim()));
    EXPECT_NEAR(multiplier, t["softmax_scale_multiplier"].get<double>(), 1e-14);
    if (!t["inv_freq_float32_as_shipped"].is_null()) {
      const auto shipped = t["inv_freq_float32_as_shipped"].get<std::vector<double>>();
      expect_rel(f.inv_freq, shipped, 1e-6);  // float32 powers and divisions
    }
  }
  RecordProperty("worst_relative_difference", std::to_string(worst));
  std::printf("worst relative difference to transformers: %.2e\n", worst);
}
