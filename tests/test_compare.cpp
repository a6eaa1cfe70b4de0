// `v3bench compare`: pairing, quartiles and threshold, exit codes (DESIGN 4).
#include <gtest/gtest.h>
#include <unistd.h>

#include <filesystem>

#include "model/error.h"
#include "reports/compare.h"

namespace v3b::rep {
namespace {

struct Spec {
  std::string c;          // case
  double q1, median, q3;  // 0 median: no time
  std::string status = "passed";
  std::string machine = "m1";
};

class Compare : public ::testing::Test {
 protected:
  std::string dir_ =
      std::filesystem::temp_directory_path() / ("v3b_compare_" + std::to_string(getpid()));
  void SetUp() override { std::filesystem::create_directories(dir_); }
  void TearDown() override { std::filesystem::remove_all(dir_); }

  std::string file(const std::string& name, const std::vector<Spec>& rows) {
    const std::string path = dir_ + "/" + name;
    CsvWriter w(path, bench_columns());
    for (const auto& s : rows) {
      Row r;
      r.op = "gemm";
      r.impl = "gemm.cpu_onednn";
      r.case_text = s.c;
      r.dtype = "bf16";
      r.cache_state = "cold";
      r.status = s.status;
      if (s.median > 0) r.q1_us = s.q1, r.median_us = s.median, r.q3_us = s.q3;
      Identity id = identity("cpu");
      id.machine = s.machine;
      w.write(r.record(id));
    }
    return path;
  }
  int code(const std::vector<Spec>& base, const std::vector<Spec>& now, CompareOptions o = {}) {
    try {
      last_ = compare_files(file("base.csv", base), file("new.csv", now), o);
      return static_cast<int>(last_.code);
    } catch (const Error& e) {
      return static_cast<int>(e.code());
    }
  }
  Comparison last_;
};

TEST_F(Compare, SameIsZero) { EXPECT_EQ(code({{"a", 9, 10, 11}}, {{"a", 9, 10, 11}}), 0); }
TEST_F(Compare, WithinThresholdIsUnchanged) {
  EXPECT_EQ(code({{"a", 9.99, 10, 10.01}}, {{"a", 10.39, 10.4, 10.41}}), 0);
  EXPECT_EQ(last_.rows[0].change, Change::unchanged);
}
TEST_F(Compare, ConfidentRegressionIsTwo) {
  EXPECT_EQ(code({{"a", 9, 10, 11}, {"b", 9, 10, 11}}, {{"a", 12, 13, 14}, {"b", 9, 10, 11}}), 2);
  EXPECT_EQ(last_.rows[0].change, Change::regression);
  EXPECT_EQ(last_.rows[0].case_text, "a");
  EXPECT_NEAR(*last_.rows[0].change_pct, 30, 1e-9);
}
TEST_F(Compare, OverlappingQuartilesAreAmbiguous) {
  const std::vector<Spec> base = {{"a", 8, 10, 13}}, now = {{"a", 11, 12, 14}};
  EXPECT_EQ(code(base, now), 0);
  EXPECT_EQ(last_.rows[0].change, Change::ambiguous);
  EXPECT_EQ(code(base, now, {.fail_on_ambiguous = true}), 3);
}
TEST_F(Compare, ImprovementIsZero) {
  EXPECT_EQ(code({{"a", 12, 13, 14}}, {{"a", 9, 10, 11}}), 0);
  EXPECT_EQ(last_.rows[0].change, Change::improvement);
}
TEST_F(Compare, ThresholdIsTheUsers) {
  const std::vector<Spec> base = {{"a", 9.9, 10, 10.1}}, now = {{"a", 11.9, 12, 12.1}};
  EXPECT_EQ(code(base, now, {.threshold_pct = 25}), 0);
  EXPECT_EQ(code(base, now, {.threshold_pct = 19}), 2);
}
TEST_F(Compare, MissingOnEitherSideIsFive) {
  EXPECT_EQ(code({{"a", 9, 10, 11}, {"b", 9, 10, 11}}, {{"a", 9, 10, 11}}), 5);
  EXPECT_EQ(code({{"a", 9, 10, 11}}, {{"a", 9, 10, 11}, {"b", 9, 10, 11}}), 5);
  EXPECT_EQ(
      code({{"a", 9, 10, 11}, {"b", 9, 10, 11}}, {{"a", 9, 10, 11}, {"b", 0, 0, 0, "unsupported"}}),
      5);
}
TEST_F(Compare, BrokenCaseIsTwoEvenBesideAMissingOne) {
  EXPECT_EQ(code({{"a", 9, 10, 11}, {"b", 9, 10, 11}}, {{"a", 0, 0, 0, "failed"}}), 2);
  EXPECT_EQ(last_.rows[0].change, Change::broken);
  EXPECT_EQ(code({{"a", 0, 0, 0}}, {{"a", 0, 0, 0, "failed"}}), 2) << "verdict-only rows count too";
}
TEST_F(Compare, DifferentMachinesAreSixUnlessAllowed) {
  const std::vector<Spec> base = {{"a", 9, 10, 11}}, now = {{"a", 9, 10, 11, "passed", "m2"}};
  EXPECT_EQ(code(base, now), 6);
  EXPECT_EQ(code(base, now, {.allow_different_machines = true}), 0);
}
TEST_F(Compare, NothingInCommonIsFive) {
  EXPECT_EQ(code({{"a", 9, 10, 11}}, {{"b", 9, 10, 11}}), 5);
}
TEST_F(Compare, NothingTimedIsFour) {
  EXPECT_EQ(code({{"a", 0, 0, 0, "unsupported"}}, {{"a", 0, 0, 0, "unsupported"}}), 4);
}
TEST_F(Compare, MissingFileAndColumn) {
  EXPECT_THROW(compare_files(dir_ + "/none.csv", dir_ + "/none.csv", {}), Error);
  { CsvWriter w(dir_ + "/bad.csv", {"op", "impl"}); }
  try {
    compare_files(dir_ + "/bad.csv", dir_ + "/bad.csv", {});
    FAIL() << "a file without columns was accepted";
  } catch (const Error& e) {
    EXPECT_EQ(e.code(), ExitCode::bad_input);
  }
}
TEST_F(Compare, TableNamesWhatChanged) {
  code({{"a", 9, 10, 11}, {"b", 9, 10, 11}}, {{"a", 12, 13, 14}, {"b", 9, 10, 11}});
  const std::string t = comparison_table(last_, false);
  EXPECT_NE(t.find("regression"), std::string::npos);
  EXPECT_NE(t.find("+30%"), std::string::npos);
  EXPECT_NE(t.find("1 unchanged"), std::string::npos);
}

}  // namespace
}  // namespace v3b::rep
