// Silly --case texts: every op refuses them with one clear line and the code of wrong usage (64), before
// anything is allocated; what does not fit into memory is a row that says so.
#include <gtest/gtest.h>

#include <chrono>
#include <set>

#include "bench/harness/check.h"
#include "bench/harness/jobs.h"
#include "bench/ops/registry.h"

namespace v3b::bench {
namespace {

const Ops& ops() {
  static const Ops all = all_ops();
  return all;
}
const OpBase& find(const std::string& name) {
  for (const auto& op : ops())
    if (op->name() == name) return *op;
  throw Error(ExitCode::usage, "no op " + name, "test");
}
void expect_refused(const OpBase& op, const std::string& text) {
  try {
    const CaseInfo info = op.parse_case(text);
    ADD_FAILURE() << op.name() << " takes " << text << " as " << info.text;
  } catch (const Error& e) {
    const std::string line = e.what();
    EXPECT_EQ(e.code(), ExitCode::usage) << op.name() << ": " << line;
    EXPECT_NE(line.find("--case of"), std::string::npos) << line;
    EXPECT_EQ(line.find('\n'), std::string::npos) << line;
  }
}
// "key=value" pairs of an op's first case.
std::vector<std::pair<std::string, std::string>> fields(const OpBase& op) {
  std::vector<std::pair<std::string, std::string>> all;
  std::string text = op.cases().front().text;
  for (size_t at = 0; at < text.size();) {
    const size_t end = std::min(text.find(',', at), text.size()), eq = text.find('=', at);
    all.emplace_back(text.substr(at, eq - at), text.substr(eq + 1, end - eq - 1));
    at = end + 1;
  }
  return all;
}
bool is_integer(const std::string& v) {
  return !v.empty() && v.find_first_not_of("-0123456789") == std::string::npos;
}

TEST(ShapeRules, EveryIntegerOfEveryOpHasLimits) {
  for (const auto& op : ops())
    for (const auto& [key, value] : fields(*op)) {
      if (!is_integer(value) || key == "zipf" || key == "ratio" || key == "capacity")
        continue;  // these are real numbers
      for (const char* bad : {"-4000000000", "4000000000", "9223372036854775807",
                              "-9223372036854775808", "99999999999999999999", "1.5", "", "x"})
        expect_refused(*op, key + "=" + bad);
    }
}

TEST(ShapeRules, TypesThatNoCaseHasAreRefused) {
  for (const auto& op : ops())
    for (const auto& [key, value] : fields(*op))
      if (key == "dtype" || key == "w_dtype" || key == "c_type")
        for (const char* bad : {"f64", "i32", "u8", "f17"}) expect_refused(*op, key + "=" + bad);
}

TEST(ShapeRules, CombinationsThatMakeNoSense) {
  const std::pair<const char*, const char*> table[] = {
      {"rmsnorm", "T=0"},
      {"rmsnorm", "d=0"},
      {"rope", "d_r=63"},
      {"rope", "d_r=1"},
      {"rope", "n_h=0"},
      {"swiglu", "m=0"},
      {"softmax", "dtype=bf16"},
      {"softmax", "n=0"},
      {"embedding", "V=0"},
      {"attention_prefill", "n_h=6,n_kv=4"},
      {"attention_prefill", "n_h=2,n_kv=4"},
      {"attention_prefill", "T=2,s0=-3"},
      {"attention_decode", "n_h=7,n_kv=2"},
      {"attention_decode", "s=10,min_s=11"},
      {"attention_decode", "B=2000000000"},
      {"mla_prefill", "d_c=0"},
      {"mla_prefill", "s0=-1"},
      {"mla_decode", "s=10,min_s=11,B=2"},
      {"mla_decode", "page=0"},
      {"mla_decode", "s_q=2000000000"},
      {"mla_cache_write", "page=0"},
      {"mla_absorb", "n_h=0"},
      {"gemm", "k=-1"},
      {"gemm", "m=-1"},
      {"fp8_quant", "rows=0"},
      {"fp8_gemm", "m=0"},
      {"fp8_gemm", "k=0"},
      {"lm_head_ce", "V=0"},
      {"topk_backward", "E=4,K=5"},
      {"topk_backward", "K=0"},
      {"router", "E=16,K=17,G=1,M=1"},
      {"router", "E=10,G=3"},
      {"router", "G=4,M=5"},
      {"router", "E=16,G=8,M=1,K=4"},
      {"router", "E=100000"},
      {"moe_dispatch", "E=4,K=5"},
      {"moe_dispatch", "T=2000000000"},
      {"moe_combine", "E=4,K=5"},
      {"moe_combine", "T=2000000000"},
      {"moe_experts", "E=4,K=5"},
      {"moe_experts", "zipf=1,hot=2"},
      {"moe_experts", "zipf=nan"},
      {"moe_experts", "zipf=inf"},
      {"moe_experts", "ratio=0.5"},
      {"moe_experts", "T=2000000000"},
      {"mtp_accept", "V=1"},
      {"mtp_accept", "gamma=0"},
      {"mtp_accept", "dtype=bf16"},
      {"forward_prefill", "K=17"},
      {"forward_prefill", "G=3"},
      {"forward_prefill", "M=5"},
      {"forward_prefill", "d_r=15"},
      {"forward_prefill", "L=4,L_d=5"},
      {"forward_prefill", "L=2000000000"},
      {"forward_prefill", "d=2000000000"},
      {"forward_prefill", "E=2000000000"},
      {"forward_decode", "B=2000000000"},
      {"forward_decode", "E=16,G=8,M=1,K=4"},
      {"forward_decode", "V=2000000000"},
      {"forward_decode", "s0=-1"},
      {"mtp_module", "B=2"},
      {"mtp_module", "K=0"},
  };
  std::set<std::string> seen;
  for (const auto& [op, text] : table) {
    expect_refused(find(op), text);
    seen.insert(op);
  }
  for (const auto& op : ops()) EXPECT_EQ(seen.count(op->name()), 1u) << op->name();
}

// Sizes that are legal but enormous: no crash, no allocation, a row with a reason, at once.
TEST(ShapeRules, WhatDoesNotFitSaysSo) {
  const std::pair<const char*, const char*> table[] = {
      {"rmsnorm", "T=2000000000,d=2000000000"},
      {"rope", "T=2000000000,n_h=2000000000"},
      {"swiglu", "T=2000000000,m=2000000000"},
      {"softmax", "T=2000000000,n=2000000000"},
      {"embedding", "T=1,d=2000000000,V=2000000000"},
      {"attention_prefill", "T=2000000000,n_h=2000000000,n_kv=2000000000"},
      {"attention_decode", "B=60000,s=2000000000"},
      {"mla_prefill", "T=2000000000,n_h=2000000000"},
      {"mla_decode", "B=60000,s=2000000000"},
      {"mla_cache_write", "T=2000000000,d_c=2000000000"},
      {"mla_absorb", "T=2000000000,n_h=2000000000,n=2000000000"},
      {"gemm", "m=2000000000,n=2000000000,k=2000000000"},
      {"fp8_quant", "rows=2000000000,cols=2000000000"},
      {"fp8_gemm", "m=2000000000,n=2000000000,k=2000000000"},
      {"lm_head_ce", "T=2000000000,d=2000000000,V=2000000000"},
      {"topk_backward", "T=2000000000,E=2000000000,K=8"},
      {"router", "T=2000000000,E=256"},
      {"moe_dispatch", "T=1000,d=2000000000"},
      {"moe_combine", "T=1000,d=2000000000"},
      {"moe_experts", "T=8,d=2000000000,m=2000000000"},
      {"mtp_accept", "B=2000000000,gamma=1,V=2000000000"},
  };
  for (const auto& [name, text] : table) {
    const OpBase& op = find(name);
    const auto t0 = std::chrono::steady_clock::now();
    for (const std::string& how : op.impls()) {
      const CheckResult r = CaseChecker(op, op.parse_case(text), 1).check(how);
      if (how.starts_with("cuda")) {
        EXPECT_NE(r.status, "passed") << name << "." << how;
      } else {
        EXPECT_EQ(r.status, "unsupported") << name << "." << how << ": " << r.reason;
      }
      EXPECT_FALSE(r.reason.empty()) << name;
    }
    const double s = std::chrono::duration<double>(std::chrono::steady_clock::now() - t0).count();
    EXPECT_LT(s, 20) << name;
  }
}

TEST(ShapeRules, EveryCaseOfEveryOpKeepsTheRules) {
  int64_t cases = 0;
  for (const auto& op : ops())
    for (const auto& c : op->cases()) {
      EXPECT_NO_THROW(EXPECT_EQ(op->parse_case(c.text).text, c.text)) << op->name();
      ++cases;
    }
  EXPECT_GE(cases, 150);
}

}  // namespace
}  // namespace v3b::bench
