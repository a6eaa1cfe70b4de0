// Verdicts: bounds by element and by norm, masks, NaN, routes with their flips (DESIGN 3, laws 2 and 5).
#include <gtest/gtest.h>

#include <cmath>
#include <limits>

#include "bench/harness/judge.h"

namespace v3b::bench {
namespace {

using spec::DType;
const double kNan = std::numeric_limits<double>::quiet_NaN();

// ---- verdicts
struct Judged {
  HostTensor y{"y", Role::output, DType::f32, {4}};
  Expected expected{{{.name = "y", .values = {1, -2, 3, -4}}}};
  Judged() {
    for (int64_t i = 0; i < 4; ++i) y.set(i, expected.tensors[0].values[static_cast<size_t>(i)]);
  }
  Verdict verdict(Tolerance t = {.rel_fro = 1e-3, .rel = 1e-2}) {
    return judge(expected, {&y}, [=](const std::string&) { return t; });
  }
};

TEST(Judge, EqualPassesEvenWithZeroTolerance) {
  Judged j;
  EXPECT_TRUE(j.verdict().passed);
  EXPECT_TRUE(j.verdict({}).passed);
  EXPECT_EQ(j.verdict({}).err_over_bound, 0);
}
TEST(Judge, NanAndInfinityFail) {
  for (double bad : {kNan, double(INFINITY), double(-INFINITY)}) {
    Judged j;
    j.y.set(2, bad);
    const Verdict v = j.verdict({.rel_fro = 1e30, .rel = 1e30});
    EXPECT_FALSE(v.passed);
    EXPECT_EQ(v.worst_index, "y[2]");
  }
}
TEST(Judge, ExpectedInfinityMustBeMet) {
  Judged j;
  j.expected.tensors[0].values[1] = INFINITY;
  EXPECT_FALSE(j.verdict().passed);
  j.y.set(1, INFINITY);
  EXPECT_TRUE(j.verdict().passed);
}
TEST(Judge, OneElementFailsThoughTheNormPasses) {
  Judged j;
  j.y.set(0, 1.02);
  const Verdict v = j.verdict({.rel_fro = 0.5, .rel = 1e-2});
  EXPECT_FALSE(v.passed);
  EXPECT_NEAR(v.err_over_bound, 2, 1e-4);
  EXPECT_EQ(v.worst_index, "y[0]");
}
TEST(Judge, DriftFailsThoughEveryElementPasses) {
  Judged j;
  for (int64_t i = 0; i < 4; ++i) j.y.set(i, j.y.get(i) * 1.005);
  const Verdict v = j.verdict({.rel_fro = 1e-3, .rel = 1e-2});
  EXPECT_FALSE(v.passed);
  EXPECT_NE(v.reason.find("Frobenius"), std::string::npos);
}
TEST(Judge, UnjudgedElementsAreSkippedButNotUnjudgedOutputs) {
  Judged j;
  j.expected.tensors[0].skip = {0, 0, 0, 1};
  j.y.set(3, kNan);
  EXPECT_TRUE(j.verdict().passed) << j.verdict().reason;
  EXPECT_EQ(j.verdict().note, "y: 3 of 4 elements judged");
  j.y.set(2, kNan);
  EXPECT_FALSE(j.verdict().passed);
  j.expected.tensors[0].skip = {1, 1, 1, 1};
  EXPECT_FALSE(j.verdict().passed) << "no element is judged";
  j.expected.tensors[0].skip = {0, 0, 1};
  EXPECT_FALSE(j.verdict().passed) << "a mask of another size";
  j.expected.tensors.clear();
  EXPECT_FALSE(j.verdict().passed) << "an output without expected values";
}
TEST(Judge, ANanOfTheReferenceFails) {
  for (double got : {kNan, 1.0}) {
    Judged j;
    j.expected.tensors[0].values[1] = kNan;
    j.y.set(1, got);
    const Verdict v = j.verdict({.rel_fro = 1e30, .rel = 1e30});
    EXPECT_FALSE(v.passed);
    EXPECT_EQ(v.reason, "y[1]: the reference itself is NaN");
    j.expected.tensors[0].skip = {0, 1, 0, 0};
    EXPECT_TRUE(j.verdict().passed) << "not judged";
  }
}
TEST(Judge, AnInfiniteErrorIsBeyondAnInfiniteBound) {
  Judged j;
  j.expected.tensors[0].values[1] = INFINITY;
  EXPECT_FALSE(j.verdict({.rel_fro = 1, .rel = 1}).passed) << "infinity over infinity is no number";
}
TEST(Judge, WrongCountsAndNamesFail) {
  Judged j;
  j.expected.tensors[0].values.push_back(1);
  EXPECT_FALSE(j.verdict().passed);
  Judged k;
  k.expected.tensors[0].name = "z";
  EXPECT_FALSE(k.verdict().passed);
}

// ---- routes (law 5)
struct Routed {
  HostTensor idx{"idx", Role::output, DType::i32, {3, 2}}, w{"w", Role::output, DType::f32, {3, 2}};
  Expected expected;
  Routed() {
    ExpectedTensor r{.name = "idx", .values = {0, 1, 2, 3, 4, 5}};
    r.route_k = 2;
    r.route_gap = {1, 1e-9, 1};
    r.route_gap_bound = 1e-6;
    r.follow = {"w"};
    expected.tensors = {r, {.name = "w", .values = {0.1, 0.9, 0.2, 0.8, 0.3, 0.7}}};
    for (int64_t i = 0; i < 6; ++i) {
      idx.set(i, r.values[static_cast<size_t>(i)]);
      w.set(i, expected.tensors[1].values[static_cast<size_t>(i)]);
    }
  }
  Verdict verdict() {
    return judge(expected, {&idx, &w},
                 [](const std::string&) { return Tolerance{.rel_fro = 1e-5, .rel = 1e-5}; });
  }
};
TEST(Routes, OrderWithinARowIsFree) {
  Routed r;
  EXPECT_TRUE(r.verdict().passed) << r.verdict().reason;
  r.idx.set(0, 1), r.idx.set(1, 0), r.w.set(0, 0.9), r.w.set(1, 0.1);
  EXPECT_TRUE(r.verdict().passed) << r.verdict().reason;
  r.w.set(0, 0.1),
      r.w.set(1, 0.9);  // weights left in the old order belong to the wrong experts now
  EXPECT_FALSE(r.verdict().passed);
}
TEST(Routes, AFlipWithinTheGapIsCountedAndItsWeightsAreNotJudged) {
  Routed r;
  r.idx.set(2, 7), r.w.set(2, 0.5);
  const Verdict v = r.verdict();
  EXPECT_TRUE(v.passed) << v.reason;
  EXPECT_EQ(v.route_flips, 1);
  EXPECT_EQ(v.note, "idx: 2 of 3 rows judged, the others flipped within the gap");
}
TEST(Routes, FewerThanHalfOfTheRowsJudgedFails) {
  Routed r;
  r.expected.tensors[0].route_gap = {1e-9, 1e-9, 1};
  r.idx.set(0, 7);
  EXPECT_TRUE(r.verdict().passed) << r.verdict().reason;
  r.idx.set(2, 8);
  const Verdict v = r.verdict();
  EXPECT_FALSE(v.passed);
  EXPECT_NE(v.reason.find("1 of 3 rows judged"), std::string::npos) << v.reason;
}
TEST(Routes, AFlipBeyondTheGapFails) {
  Routed r;
  r.idx.set(0, 7);
  EXPECT_FALSE(r.verdict().passed);
}
TEST(Routes, ARepeatedExpertFailsEvenInATie) {
  Routed r;
  r.idx.set(2, 3);
  EXPECT_FALSE(r.verdict().passed);
  Routed s;
  s.idx.set(2, -1);
  EXPECT_FALSE(s.verdict().passed);
}
TEST(Routes, NanWeightsFail) {
  Routed r;
  r.w.set(5, kNan);
  EXPECT_FALSE(r.verdict().passed);
}

}  // namespace
}  // namespace v3b::bench
