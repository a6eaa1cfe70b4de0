// The mtp-decoding scenario: summary arithmetic, identity with plain decoding, forced acceptance,
// resuming, bad input.
#include <gtest/gtest.h>

#include <cmath>
#include <filesystem>
#include <fstream>
#include <sstream>

#include "model/error.h"
#include "reference/speculative.h"
#include "reports/table.h"
#include "scenarios/mtp_decoding.h"
#include "tests/described_columns.h"

namespace v3b {
namespace {

namespace fs = std::filesystem;

scen::MtpPrompt prompt(std::vector<int64_t> drafted, std::vector<int64_t> accepted) {
  scen::MtpPrompt p;
  p.drafted = std::move(drafted), p.accepted = std::move(accepted);
  p.steps = p.drafted[0];
  p.emitted = p.steps;
  for (const int64_t a : p.accepted) p.emitted += a;
  p.plain_emitted = p.emitted;
  p.base_us = 1000, p.verify_us = 1200, p.draft_us = 300;
  p.plain_s = 1e-3 * static_cast<double>(p.plain_emitted);
  p.s = 1.5e-3 * static_cast<double>(p.steps);
  return p;
}

TEST(MtpSummary, OneDraft) {  // SPEC 1.28: (1 + alpha) / (r_v + r_d)
  const auto a = prompt({100}, {85}), b = prompt({300}, {275});
  const auto s = scen::summarize_mtp({&a, &b});
  EXPECT_EQ(s.drafted, std::vector<int64_t>{400});
  EXPECT_EQ(s.accepted, std::vector<int64_t>{360});
  EXPECT_NEAR(s.tokens_per_step, 1.9, 1e-12);
  EXPECT_NEAR(s.r_v, 1.2, 1e-12);
  EXPECT_NEAR(s.r_d, 0.3, 1e-12);
  EXPECT_NEAR(s.predicted, 1.9 / 1.5, 1e-12);
  EXPECT_NEAR(s.measured, 1.9 / 1.5, 1e-12);  // nothing else costs time here
  EXPECT_NEAR(s.break_even, 0.5, 1e-9);
  EXPECT_NEAR(s.plain_median, 1000, 1e-9);
  EXPECT_EQ(s.identical, 2);
}

TEST(MtpSummary, SeveralDrafts) {
  const auto a = prompt({100, 80, 40}, {80, 40, 30});
  const auto s = scen::summarize_mtp({&a});
  EXPECT_NEAR(s.tokens_per_step, 1 + 0.8 + 0.4 + 0.3, 1e-12);
  EXPECT_NEAR(s.predicted, s.tokens_per_step / 1.5, 1e-12);
}

TEST(MtpSummary, BreakEven) {
  EXPECT_EQ(scen::break_even_acceptance(0.9, 1), 0);
  EXPECT_NEAR(scen::break_even_acceptance(1.044, 1), 0.044, 1e-9);
  EXPECT_GT(scen::break_even_acceptance(2.2, 1), 1);  // never
  const double a = scen::break_even_acceptance(1.8, 3);
  EXPECT_NEAR(ref::tokens_per_step(a, 3), 1.8, 1e-9);
}

TEST(MtpSummary, NearTiesAndMismatches) {
  auto a = prompt({10}, {5}), b = a, c = a, d = a;
  b.first_diff = 3, b.diff_margin = 0.005;
  c.first_diff = 3, c.diff_margin = 0.02;
  d.first_diff = 3, d.diff_margin = std::nan("");  // unproven is failed
  const auto s = scen::summarize_mtp({&a, &b, &c, &d});
  EXPECT_EQ(s.identical, 1);
  EXPECT_EQ(s.near_ties, 1);
  EXPECT_EQ(s.mismatches, 2);
}

TEST(MtpSummary, Quantile) {
  EXPECT_EQ(scen::quantile({4, 1, 3, 2}, 0.5), 2.5);
  EXPECT_EQ(scen::quantile({5}, 0.25), 5);
  EXPECT_TRUE(std::isnan(scen::quantile({}, 0.5)));
}

class MtpRun : public ::testing::Test {
 protected:
  void SetUp() override {
    dir_ = (fs::temp_directory_path() /
            ("v3b_test_mtp_" +
             std::string(::testing::UnitTest::GetInstance()->current_test_info()->name())))
               .string();
    fs::remove_all(dir_);
    fs::create_directories(dir_);
    std::ofstream text(dir_ + "/text.txt");
    for (int i = 0; i < 60; ++i) text << "Line " << i * 37 % 101 << " of a text that repeats.\n";
    o_.out = dir_ + "/out";
    o_.model = "random:train";
    o_.text = dir_ + "/text.txt";
    o_.backend = "cpu_f32";
    o_.drafts = {1, 2};
    o_.temperatures = {1};
    o_.prompts = 2;
    o_.prompt_tokens = 16;
    o_.max_new = 24;
    o_.forced = {0, 0.9, 1};
    o_.forced_prompts = 2;
    o_.text_tokens = 40;
    o_.print_table = false;
  }
  rep::CsvTable run() {
    EXPECT_EQ(scen::run_mtp_decoding(o_), 0);
    return rep::read_csv(o_.out + "/mtp_decoding.csv");
  }
  static std::vector<size_t> rows(const rep::CsvTable& t, const std::string& kind) {
    std::vector<size_t> out;
    for (size_t i = 0; i < t.rows.size(); ++i)
      if (t.cell(i, "kind") == kind) out.push_back(i);
    return out;
  }
  std::string dir_;
  scen::MtpOptions o_;
};

TEST_F(MtpRun, CountsBelongTogether) {
  const auto t = run();
  // Greedy and one temperature, two numbers of drafts, two prompts; three oracles on two prompts.
  EXPECT_EQ(rows(t, "prompt").size(), 2u * 2 * 2 + 3 * 2);
  for (const size_t i : rows(t, "summary")) {
    EXPECT_GT(*t.number(i, "steps"), 0);
    EXPECT_NEAR(*t.number(i, "tokens_per_step"), *t.number(i, "emitted") / *t.number(i, "steps"),
                1e-12);
    for (const char* c : {"predicted_speedup", "measured_speedup", "base_us", "verify_us",
                          "draft_us", "plain_median_tokens_s", "speculative_median_tokens_s"}) {
      EXPECT_GT(t.number(i, c).value_or(-1), 0) << c;
    }
    if (t.cell(i, "decoding") == "greedy") {
      EXPECT_EQ(*t.number(i, "mismatches"), 0);
      EXPECT_EQ(*t.number(i, "identical_prompts") + *t.number(i, "near_ties"), 2);
    }
  }
  for (const size_t i : rows(t, "position")) {
    const double a = *t.number(i, "accepted"), n = *t.number(i, "drafted");
    EXPECT_LE(a, n);
    if (n == 0) continue;
    EXPECT_NEAR(*t.number(i, "acceptance"), a / n, 1e-12);
    EXPECT_LE(*t.number(i, "acceptance_low"), a / n);
    EXPECT_GE(*t.number(i, "acceptance_high"), a / n);
    if (t.cell(i, "forced_acceptance") == "1") {
      EXPECT_EQ(a, n);  // the oracle is always right
    }
    if (t.cell(i, "forced_acceptance") == "0") {
      EXPECT_EQ(a, 0);  // and never
    }
  }
  for (const size_t i : rows(t, "summary")) {
    // A step emits one token without acceptance and two with it, the last one perhaps fewer.
    const double steps = *t.number(i, "steps"), emitted = *t.number(i, "emitted");
    if (t.cell(i, "forced_acceptance") == "0") {
      EXPECT_EQ(steps, emitted);
    }
    if (t.cell(i, "forced_acceptance") == "1") {
      EXPECT_GE(2 * steps, emitted);
      EXPECT_LE(2 * steps, emitted + 2);  // two prompts
    }
  }
  ASSERT_EQ(rows(t, "text").size(), 2u);
  for (const size_t i : rows(t, "text")) {
    EXPECT_EQ(*t.number(i, "drafted"), 40);
    const auto a =
        t.number(i, t.cell(i, "decoding") == "greedy" ? "acceptance" : "expected_acceptance");
    ASSERT_TRUE(a);
    EXPECT_GE(*a, 0);
    EXPECT_LE(*a, 1);
  }
}

TEST_F(MtpRun, ResumeGoesOnFromPrompts) {
  const auto full = run();
  const std::string path = o_.out + "/mtp_decoding.csv";
  std::ifstream in(path);
  std::vector<std::string> lines;
  for (std::string l; std::getline(in, l);) lines.push_back(l);
  in.close();
  std::ofstream out(path, std::ios::trunc);
  for (size_t i = 0; i <= 6; ++i) out << lines[i] << '\n';
  out << lines[7].substr(0, lines[7].size() / 2);
  out.close();
  o_.resume = true;
  const auto again = run();
  ASSERT_EQ(again.rows.size(), full.rows.size());
  for (size_t i = 0; i < 6; ++i) EXPECT_EQ(again.rows[i], full.rows[i]);
  // What is counted does not depend on the interruption.
  const auto a = rows(full, "position"), b = rows(again, "position");
  ASSERT_EQ(a.size(), b.size());
  for (size_t k = 0; k < a.size(); ++k)
    for (const char* c : {"decoding", "drafts", "position", "drafted", "accepted"})
      EXPECT_EQ(full.cell(a[k], c), again.cell(b[k], c)) << c;
}

TEST_F(MtpRun, TableFromTheFileAlone) {
  (void)run();
  const std::string table = rep::render_table(o_.out + "/mtp_decoding.csv");
  EXPECT_NE(table.find("breaks even at"), std::string::npos);
  EXPECT_NE(table.find("2 of 2"), std::string::npos);
  EXPECT_NE(table.find("90.0%"), std::string::npos);
  EXPECT_NE(table.find("T 1, top-p 0.95"), std::string::npos);
}

TEST_F(MtpRun, BadInput) {
  const auto code = [&](auto change) {
    scen::MtpOptions o = o_;
    change(o);
    try {
      scen::run_mtp_decoding(o);
    } catch (const Error& e) {
      EXPECT_EQ(std::string(e.what()).find('\n'), std::string::npos);
      return e.code();
    }
    return ExitCode::ok;
  };
  EXPECT_EQ(code([](auto& o) { o.drafts = {0}; }), ExitCode::usage);
  EXPECT_EQ(code([](auto& o) { o.temperatures = {0}; }), ExitCode::usage);
  EXPECT_EQ(code([](auto& o) { o.top_p = 0; }), ExitCode::usage);
  EXPECT_EQ(code([](auto& o) { o.top_p = std::nan(""); }), ExitCode::usage);
  EXPECT_EQ(code([](auto& o) { o.forced = {1.5}; }), ExitCode::usage);
  EXPECT_EQ(code([](auto& o) { o.prompts = -3; }), ExitCode::usage);
  EXPECT_EQ(code([](auto& o) { o.max_new = 500; }), ExitCode::usage);  // context 512
  EXPECT_EQ(code([](auto& o) { o.backend = "gpu"; }), ExitCode::usage);
  EXPECT_EQ(code([](auto& o) { o.model = "/nowhere"; }), ExitCode::not_found);
  EXPECT_EQ(code([](auto& o) { o.out = "/proc/v3b"; }), ExitCode::cannot_write);
}

TEST_F(MtpRun, EveryColumnIsDescribed) {
  const auto t = run();
  expect_columns_described("mtp_decoding.csv", t.header);
}

}  // namespace
}  // namespace v3b
