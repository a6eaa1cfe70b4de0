// What the scenarios share: intervals, losses, token sets.
#include <gtest/gtest.h>

#include <cmath>
#include <filesystem>
#include <fstream>

#include "model/error.h"
#include "reports/table.h"
#include "scenarios/common.h"

namespace v3b {
namespace {

TEST(ScenarioCommon, Wilson) {
  // Published example values of the score interval.
  const auto a = scen::wilson(8, 10);
  EXPECT_NEAR(a.low, 0.4901625, 1e-6);
  EXPECT_NEAR(a.high, 0.9433178, 1e-6);
  EXPECT_EQ(scen::wilson(0, 10).low, 0);
  EXPECT_NEAR(scen::wilson(0, 10).high, 0.2775328, 1e-6);
  EXPECT_EQ(scen::wilson(10, 10).high, 1);
  EXPECT_EQ(scen::wilson(0, 0).low, 0);
  EXPECT_EQ(scen::wilson(0, 0).high, 1);
}

TEST(ScenarioCommon, Bootstrap) {
  const std::vector<double> w = {10, 20, 5, 40, 8, 30}, same = {20, 40, 10, 80, 16, 60};
  const auto constant = scen::bootstrap_ratio(same, w, 1);
  EXPECT_NEAR(constant.mean, 2, 1e-12);
  EXPECT_NEAR(constant.interval.low, 2, 1e-12);
  EXPECT_NEAR(constant.interval.high, 2, 1e-12);
  const std::vector<double> spread = {0, 40, 10, 200, 0, 20};
  const auto r = scen::bootstrap_ratio(spread, w, 1), again = scen::bootstrap_ratio(spread, w, 1);
  EXPECT_NEAR(r.mean, 270.0 / 113, 1e-12);
  EXPECT_LT(r.interval.low, r.mean - 0.5);
  EXPECT_GT(r.interval.high, r.mean + 0.5);
  EXPECT_EQ(r.interval.low, again.interval.low);
  EXPECT_NE(r.interval.low, scen::bootstrap_ratio(spread, w, 2).interval.low);
  EXPECT_THROW(scen::bootstrap_ratio(spread, std::vector<double>{1}, 1), Error);
}

TEST(ScenarioCommon, TokenLoss) {
  const float logits[3] = {1.0f, 2.0f, -1e30f};
  const double z = std::log(std::exp(1.0) + std::exp(2.0));
  EXPECT_NEAR(scen::token_loss(logits, 3, 0), z - 1, 1e-12);
  EXPECT_NEAR(scen::token_loss(logits, 3, 1), z - 2, 1e-12);
  EXPECT_THROW(scen::token_loss(logits, 3, 3), Error);
  EXPECT_THROW(scen::token_loss(logits, 3, -1), Error);
  const float bad[2] = {NAN, 0};
  EXPECT_TRUE(std::isnan(scen::token_loss(bad, 2, 0)));
  EXPECT_TRUE(std::isnan(scen::token_loss(bad, 2, 1)));
  const float huge[2] = {3e38f, 3e38f};
  EXPECT_NEAR(scen::token_loss(huge, 2, 0), std::log(2.0), 1e-6);
}

TEST(ScenarioCommon, ParamsAreSeedThreadsAndFlags) {
  scen::CommonOptions o;
  o.seed = 7;
  o.threads = 3;
  EXPECT_EQ(scen::params_text(o), "seed=7;threads=3;flags=default");
  o.flags.router_mask = spec::RouterMask::zero;
  o.flags.norm_rounding = spec::NormRounding::hf;
  const std::string p = scen::params_text(o);
  EXPECT_EQ(scen::param_of(p, "flags"), "norm_rounding=hf,router_mask=zero");
  EXPECT_EQ(scen::param_of("rope_type=yarn;" + p, "seed"), "7");
  EXPECT_EQ(scen::param_of(p, "eed"), "");
  EXPECT_EQ(scen::backend_options(o).flags.router_mask, spec::RouterMask::zero);
}

// --resume never mixes rows of different flags; files from before the column are rows of
// the defaults.
TEST(ScenarioCommon, ResumeRefusesOtherFlags) {
  scen::CommonOptions o;
  o.out = (std::filesystem::temp_directory_path() / "v3b_test_common_resume").string();
  std::filesystem::remove_all(o.out);
  const auto open = [&](bool resume) {
    o.resume = resume;
    return scen::open_csv(o, "x.csv", {"case", "params"}, {"case"});
  };
  rep::Record r;
  open(false)->write(
      r.set("case", "a").set("params", scen::params_text(o)).set(rep::identity("cpu")));
  EXPECT_EQ(open(true)->resumed_rows(), 1);
  o.threads = 5;  // no reason to measure again
  EXPECT_EQ(open(true)->resumed_rows(), 1);
  const auto refused = [&](const char* part) {
    try {
      (void)open(true);
      ADD_FAILURE() << part;
    } catch (const Error& e) {
      EXPECT_EQ(e.code(), ExitCode::usage);
      EXPECT_NE(std::string(e.what()).find(part), std::string::npos) << e.what();
      EXPECT_EQ(std::string(e.what()).find('\n'), std::string::npos);
    }
  };
  o.flags.router_mask = spec::RouterMask::zero;
  refused("router_mask=zero");
  o.flags = {};
  std::ofstream(o.out + "/x.csv", std::ios::trunc) << "schema_version,case\n1,a\n";
  EXPECT_EQ(open(true)->resumed_rows(), 1);
  std::ofstream(o.out + "/x.csv", std::ios::trunc) << "schema_version,case\n1,a\n";
  o.flags.router_mask = spec::RouterMask::zero;
  refused("router_mask=zero");
}

// Columns are only ever added: published files, from before the last ones, make their tables.
TEST(ScenarioCommon, PublishedFilesMakeTables) {
  int files = 0;
  const std::string root = std::string(V3B_SOURCE_DIR) + "/reports/published";
  for (const auto& e : std::filesystem::recursive_directory_iterator(root)) {
    if (e.path().extension() != ".csv") continue;
    ++files;
    EXPECT_GT(rep::render_table(e.path().string()).size(), 500u) << e.path();
  }
  EXPECT_GE(files, 6);
}

TEST(ScenarioCommon, TokensOfATextFile) {
  const std::string path =
      (std::filesystem::temp_directory_path() / "v3b_test_common.txt").string();
  const std::string text = "Keys and values,\n\tcached.\n";
  std::ofstream(path, std::ios::binary) << text;
  scen::CommonOptions o;
  o.text = path;
  for (const char* model : {"random:train", "random:tiny-v3"}) {
    o.model = model;
    const auto m = scen::load_model(o);
    EXPECT_FALSE(m.trained);
    const auto set = scen::load_tokens(o, m);
    ASSERT_EQ(set.docs.size(), 1u);
    EXPECT_EQ(set.docs[0].ids[0], m.config().bos_token_id);
    EXPECT_EQ(set.docs[0].bytes, static_cast<int64_t>(text.size()));
    EXPECT_EQ(set.docs[0].token_bytes.size(), set.docs[0].ids.size());
    EXPECT_EQ(set.docs[0].token_bytes[0], 0);
    const auto cut = scen::load_tokens(o, m, {.max_tokens = 5});
    EXPECT_EQ(cut.docs[0].ids.size(), 5u);
    EXPECT_LT(cut.docs[0].bytes, set.docs[0].bytes);
    EXPECT_THROW(scen::load_tokens(o, m, {.min_tokens = 10000}), Error);
  }
  o.model = "random:micro";  // a vocabulary of 64: no tokenizer fits
  const auto micro = scen::load_model(o);
  EXPECT_THROW(scen::load_tokens(o, micro), Error);
  o.model = "random:nothing";
  EXPECT_THROW(scen::load_model(o), Error);
}

}  // namespace
}  // namespace v3b
