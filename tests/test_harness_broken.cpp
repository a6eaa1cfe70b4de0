// Law 11: kernels that are wrong on purpose must all be caught, and the right ones must pass. Every op
// of the registry has its list of damages in tests/broken_*.h.
#include <gtest/gtest.h>

#include <algorithm>
#include <cstdlib>
#include <map>
#include <set>

#include "bench/harness/check.h"
#include "bench/harness/jobs.h"
#include "bench/ops/registry.h"
#include "tests/broken_attention.h"
#include "tests/broken_blocks.h"
#include "tests/broken_forward.h"
#include "tests/broken_kernels.h"
#include "tests/broken_moe.h"

namespace v3b::bench {
namespace {

using namespace broken;

class Broken : public ::testing::Test {
 protected:
  static void SetUpTestSuite() { ops_ = new Ops(all_ops()); }
  static void TearDownTestSuite() {
    delete ops_;
    ops_ = nullptr;
  }
  static Ops* ops_;
  static const OpBase* find(const std::string& name) {
    for (const auto& op : *ops_)
      if (op->name() == name) return op.get();
    return nullptr;
  }
  static void run(const std::vector<Victim>& victims) {
    for (const Victim& victim : victims) run(victim);
  }

 private:
  static void run(const Victim& victim) {
    const OpBase* op = find(victim.op);
    ASSERT_NE(op, nullptr) << victim.op;
    const CaseInfo info = op->parse_case(victim.text);
    const auto impls = op->impls();
    for (const std::string& how : impls) {
      if (op->support(how, info.text).state != Support::State::yes) continue;
      const CheckResult right = CaseChecker(*op, info, 1).check(how);
      EXPECT_EQ(right.status, "passed")
          << impl_name(*op, how) << "/" << info.text << ": " << right.reason;
    }
    // Damages go to an implementation that runs here.
    const auto runs = std::find_if(impls.begin(), impls.end(), [&](const std::string& how) {
      return op->support(how, info.text).state == Support::State::yes;
    });
    ASSERT_NE(runs, impls.end()) << victim.op;
    const std::string victim_impl = *runs;
    std::vector<Damage> damages = generic_damages(op->make(info.text, Fill::real, 1).tensors);
    damages.insert(damages.end(), victim.own.begin(), victim.own.end());
    int64_t caught = 0;
    for (const Damage& damage : damages) {
      const BrokenOp broken(*op, victim_impl, damage);
      const CheckResult r = CaseChecker(broken, info, 1).check("broken");
      const std::string what = impl_name(*op, victim_impl) + "/" + info.text + ", " + damage.name;
      if (!broken.changed()) {
        EXPECT_TRUE(damage.may_change_nothing) << what << ": the damage changes nothing";
        continue;
      }
      EXPECT_EQ(r.status, "failed")
          << what << ": " << r.reason << ", error over bound " << r.verdict.err_over_bound;
      EXPECT_FALSE(r.reason.empty()) << what;
      caught += r.status == "failed";
    }
    EXPECT_GE(caught, 8) << victim.op;
  }
};
Ops* Broken::ops_ = nullptr;

TEST_F(Broken, Blocks) { run(block_victims()); }
TEST_F(Broken, Attention) { run(attention_victims()); }
TEST_F(Broken, Moe) { run(moe_victims()); }
TEST_F(Broken, Forward) { run(forward_victims()); }
TEST_F(Broken, Acceptance) { run(acceptance_victims()); }

TEST_F(Broken, EveryOpHasItsOwnDamages) {
  std::map<std::string, size_t> own;
  for (const auto& list : {block_victims(), attention_victims(), moe_victims(), forward_victims(),
                           acceptance_victims()})
    for (const Victim& v : list) own[v.op] += v.own.size();
  for (const auto& op : *ops_) EXPECT_GE(own[op->name()], 1u) << op->name() << " has no damages";
  EXPECT_EQ(own.size(), ops_->size()) << "a victim that is no op";
}

TEST_F(Broken, ADamagedInputDoesNotReachTheReference) {
  // After a kernel that ruins its input, the next implementation is judged by a clean reference.
  const OpBase* op = find("rmsnorm");
  ASSERT_NE(op, nullptr);
  const CaseInfo info = op->parse_case("T=5,d=130,dtype=bf16");
  const Damage ruin{.name = "zeroes its input", .after = scaled("x", 0)};
  const BrokenOp broken(*op, op->impls().front(), ruin);
  CaseChecker checker(broken, info, 1);
  const CheckResult r = checker.check("broken");
  EXPECT_EQ(r.status, "failed");
  EXPECT_NE(r.reason.find("changed its input 'x'"), std::string::npos) << r.reason;
  EXPECT_FALSE(checker.has_expected());
}

TEST_F(Broken, TheNoDamageWrapperPasses) {
  const OpBase* op = find("rmsnorm");
  ASSERT_NE(op, nullptr);
  const BrokenOp whole(*op, op->impls().front(), {.name = "none"});
  EXPECT_EQ(CaseChecker(whole, op->parse_case("T=5,d=130,residual=1"), 1).check("broken").status,
            "passed");
  EXPECT_FALSE(whole.changed());
}

TEST_F(Broken, ThePlainAttentionOfTheDamagesIsRight) {
  const OpBase* op = find("attention_prefill");
  ASSERT_NE(op, nullptr);
  const BrokenOp plain(
      *op, op->impls().front(),
      {.name = "none", .after = PlainAttention{.s0 = 5, .n_kv = 2}, .skip_run = true});
  const CheckResult r =
      CaseChecker(plain, op->parse_case("T=33,s0=5,n_h=6,n_kv=2,d_qk=24,d_v=16,dtype=bf16"), 1)
          .check("broken");
  EXPECT_EQ(r.status, "passed") << r.reason;
}

}  // namespace
}  // namespace v3b::bench
