// The AMX level of the attention kernels on the emulation of kernels/core/amx.h, where this CPU has AVX512_BF16: every
// small odd shape of the ops against the reference, and the level's own row beside the others.
#include <gtest/gtest.h>

#include <cstdlib>
#include <string>

#include "bench/harness/check.h"
#include "bench/ops/registry.h"
#include "kernels/attention/attention.h"
#include "kernels/core/cpu.h"

namespace v3b {
namespace {

// Before anybody asks for the CPU's features. The emulation needs AVX512_BF16 and refuses to start without.
const bool kEmulated =
    __builtin_cpu_supports("avx512bf16") != 0 && setenv("V3BENCH_AMX", "emulate", 1) == 0;

TEST(AttentionAmx, OddShapesOnTheEmulation) {
  if (!kEmulated) GTEST_SKIP() << "no AVX512_BF16 here";
  ASSERT_EQ(kern::best_isa(), kern::Isa::amx);
  EXPECT_STREQ(kern::attention_cpu_simd_isa(spec::DType::bf16), "amx_bf16 (emulated)");
  int checked = 0, lower = 0;
  for (const int threads : {1, 2, 3}) {
    kern::set_num_threads(threads);
    for (const auto& op : bench::all_ops()) {
      const std::string name = op->name();
      if (name != "attention_prefill" && name != "attention_decode" && name != "mla_prefill" &&
          name != "mla_decode")
        continue;
      for (const auto& c : op->cases()) {
        if (!c.check_only || c.dtype != "bf16") continue;
        bench::CaseChecker checker(*op, c, 11);
        for (const auto& how : op->impls()) {
          if (!how.starts_with("cpu_simd")) continue;
          const auto r = checker.check(how);
          EXPECT_EQ(r.status, "passed") << name << "." << how << " " << c.text << ": " << r.reason;
          ++(how == "cpu_simd" ? checked : lower);
        }
      }
    }
  }
  EXPECT_GE(checked, 45);
  EXPECT_EQ(lower, 3 * checked);  // avx2, avx512, avx512_bf16
  kern::set_num_threads(0);
}

}  // namespace
}  // namespace v3b
