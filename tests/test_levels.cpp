// Instruction-set levels: IsaCap, jobs of an implementation with levels, and the tile emulation of kernels/core/amx.h.
#include <gtest/gtest.h>
#include <omp.h>

#include <algorithm>
#include <cmath>
#include <vector>

#include "bench/harness/check.h"
#include "bench/harness/jobs.h"
#include "kernels/core/cpu.h"
#include "kernels/core/pass_team.h"
#define V3B_AMX_EMULATE 1
#include "kernels/core/amx.h"
#include "reference/spec/dtype.h"

namespace v3b {
namespace {

using kern::Isa;

// A short pass on a core shared with another process: dozens of switches, milliseconds.
TEST(PassTeam, LeavesATeamThatSharesACoreAndTriesAgain) {
  kern::TeamChoice c;
  const auto team_until_alone = [&](double us, int64_t switches, int64_t most) {
    int64_t n = 0;
    while (!c.alone() && n < most) c.passed(us, switches), ++n;
    return n;
  };
  const auto alone_for = [&] {
    int64_t n = 0;
    while (c.alone()) c.passed(230, 1), ++n;
    return n;
  };
  EXPECT_EQ(team_until_alone(170, 0, 1000), 1000);  // quiet
  EXPECT_EQ(team_until_alone(170, 2, 1000), 1000);  // another process now and then
  EXPECT_EQ(team_until_alone(150e3, 38, 1000), 1);
  EXPECT_EQ(alone_for(), 256);
  EXPECT_EQ(team_until_alone(150e3, 38, 1000), 1);  // still so: longer alone
  EXPECT_EQ(alone_for(), 1024);
  for (int i = 0; i < 4; ++i) {
    EXPECT_EQ(team_until_alone(150e3, 38, 1000), 1);
    EXPECT_LE(alone_for(), 8192);
  }
  EXPECT_EQ(team_until_alone(170, 0, 1000), 1000);  // it was over for a while
  EXPECT_EQ(team_until_alone(150e3, 38, 1000), 1);
  EXPECT_EQ(alone_for(), 256);
  // A long pass has many switches beside other work, and one thread is no faster: the team stays.
  c = {};
  EXPECT_EQ(team_until_alone(50e3, 13, 1000), 1);
  c.passed(90e3, 20);
  EXPECT_FALSE(c.alone());
  EXPECT_EQ(team_until_alone(50e3, 13, 1000), 1000);
}

TEST(PassTeam, GivesTheThreadsBackAndLeavesSeveralRowsAlone) {
  const int before = omp_get_max_threads();
  omp_set_num_threads(2);
  kern::TeamChoice c;
  c.passed(150e3, 38);
  ASSERT_TRUE(c.alone());
  {
    const kern::PassTeam several(c, 8);
    EXPECT_EQ(kern::num_threads(), 2);
  }
  {
    const kern::PassTeam one(c, 1);
    EXPECT_EQ(kern::num_threads(), 1);
  }
  EXPECT_EQ(kern::num_threads(), 2);
  omp_set_num_threads(before);
}

TEST(IsaCap, HidesWhatLiesAboveAndNests) {
  const Isa best = kern::best_isa();
  const bool avx512 = kern::cpu_features().avx512;
  {
    const kern::IsaCap outer(Isa::avx512);
    EXPECT_LE(kern::best_isa(), Isa::avx512);
    EXPECT_FALSE(kern::cpu_features().avx512_bf16);
    EXPECT_EQ(kern::cpu_features().avx512, avx512);
    {
      const kern::IsaCap inner(Isa::avx2);
      EXPECT_EQ(kern::best_isa(), Isa::avx2);
      EXPECT_FALSE(kern::cpu_features().avx512 || kern::cpu_features().avx512_vnni);
      const kern::IsaCap no_lift(Isa::amx);  // a cap never lifts one that holds
      EXPECT_EQ(kern::best_isa(), Isa::avx2);
    }
    EXPECT_EQ(kern::cpu_features().avx512, avx512);
  }
  EXPECT_EQ(kern::best_isa(), best);
}

struct LevelShape {
  int64_t n = 1;
  spec::DType dtype = spec::DType::f32;
  template <class S, class V>
  static void visit(S& s, V&& v) {
    v("n", s.n);
    v("dtype", s.dtype);
  }
};

// Writes the level that it sees, once where it is prepared and once where it runs.
struct LevelOp {
  static constexpr const char* name = "level";
  using Shape = LevelShape;
  struct Data {
    bench::HostTensor y;
    std::vector<bench::HostTensor*> tensors() { return {&y}; }
  };
  static std::unique_ptr<Data> make(const Shape&, bench::Fill, uint64_t) {
    auto d = std::make_unique<Data>();
    d->y = bench::HostTensor("y", bench::Role::output, spec::DType::f32, {2});
    return d;
  }
  static bench::Expected reference(const Data&) { return {{{.name = "y", .values = {0, 0}}}}; }
  static bench::Cost cost(const Shape&) { return {}; }
  static bench::Tolerance tolerance(const Shape&, bench::Fill, const std::string&) { return {}; }
  static std::vector<bench::Case<Shape>> cases() { return {{}}; }
  static std::vector<bench::Impl<LevelOp>> impls() {
    const auto prepare = [](Data& d) {
      const auto prepared = static_cast<float>(kern::best_isa());
      return bench::Runner{.run = [&d, prepared] {
        d.y.as<float>()[0] = prepared;
        d.y.as<float>()[1] = static_cast<float>(kern::best_isa());
      }};
    };
    return {{"cpu_simd", nullptr, prepare, false, {Isa::avx2, Isa::avx512, Isa::amx}}};
  }
};

TEST(Levels, EachRunsAtItsOwn) {
  const auto op = bench::make_op<LevelOp>();
  const Isa best = kern::best_isa();
  for (const Isa level : {Isa::avx2, Isa::avx512, Isa::amx}) {
    const std::string how = std::string("cpu_simd@") + kern::isa_name(level);
    const auto all = op->impls();
    const bool listed = std::find(all.begin(), all.end(), how) != all.end();
    EXPECT_EQ(listed, level != best) << how;
    if (!listed) continue;
    const bench::Support s = op->support(how, "n=1");
    EXPECT_EQ(s.state == bench::Support::State::yes, level < best) << how << ": " << s.reason;
    if (level > best) {
      EXPECT_NE(s.reason.find(kern::isa_name(level)), std::string::npos) << s.reason;
      continue;
    }
    auto data = op->make("n=1", bench::Fill::real, 1);
    op->prepare(how, data).run();
    EXPECT_EQ(data.tensors[0]->get(0), static_cast<double>(level));
    EXPECT_EQ(data.tensors[0]->get(1), static_cast<double>(level));
    EXPECT_EQ(kern::best_isa(), best);
  }
}

// 13 x 20 (A) times 20 x 9 (B as pairs of rows), against double.
TEST(AmxEmulation, ProductOfRaggedTiles) {
  namespace amx = kern::amx;
  constexpr int kM = 13, kK = 20, kN = 9;
  spec::bf16 a[kM][kK], b[kK / 2][kN][2];
  for (int m = 0; m < kM; ++m)
    for (int k = 0; k < kK; ++k) a[m][k] = spec::to_bf16(0.25f * static_cast<float>(m - k));
  for (int k = 0; k < kK; ++k)
    for (int n = 0; n < kN; ++n)
      b[k / 2][n][k % 2] = spec::to_bf16(0.5f * static_cast<float>(k * n % 7) - 1);
  amx::Config config;
  config.tile(0, kM, kN * 4);
  config.tile(1, kM, kK * 2);
  config.tile(2, kK / 2, kN * 4);
  amx::configure(config);
  amx::zero<0>();
  amx::load<1>(a, sizeof a[0]);
  amx::load<2>(b, sizeof b[0]);
  amx::dpbf16<0, 1, 2>();
  amx::dpbf16<0, 1, 2>();  // accumulates
  float c[kM][kN];
  amx::store<0>(c, sizeof c[0]);
  for (int m = 0; m < kM; ++m)
    for (int n = 0; n < kN; ++n) {
      double sum = 0;
      for (int k = 0; k < kK; ++k)
        sum += 2 * static_cast<double>(spec::to_float(a[m][k])) *
               static_cast<double>(spec::to_float(b[k / 2][n][k % 2]));
      EXPECT_EQ(static_cast<double>(c[m][n]), sum)
          << m << " " << n;  // exact: small multiples of 1/8
    }
  config.rows[2] = 9;  // does not fit A's 10 pairs: a fault on hardware
  amx::configure(config);
  amx::zero<0>();
  amx::dpbf16<0, 1, 2>();
  amx::store<0>(c, sizeof c[0]);
  EXPECT_TRUE(std::isnan(c[0][0]));
  amx::release();
}

}  // namespace
}  // namespace v3b
