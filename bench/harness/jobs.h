// Which jobs run: an op x case with its implementations is a group; groups come from the ops' own
// lists or from
// --case, and are picked by op, implementation, device and regular expression.
#pragma once
#include <memory>
#include <string>
#include <vector>

#include "bench/harness/op.h"

namespace v3b::bench {

using Ops = std::vector<std::unique_ptr<OpBase>>;

struct Selection {
  std::vector<std::string> ops;    // empty: all
  std::vector<std::string> impls;  // "cpu_simd" or "rmsnorm.cpu_simd"; empty: all
  std::vector<std::string>
      cases;           // "T=1:512:*2,d=7168": with exactly one op; ranges make several cases
  std::string filter;  // regular expression searched in "rmsnorm.cpu_simd/T=512,..."
  std::string device;  // "cpu", "cuda", or empty: all
  std::string cache;   // "hot", "cold", or empty: as the case says
  Size size = Size::standard;    // largest size taken from the ops' lists
  bool check_only_cases = true;  // include cases that are worth no time
};

struct JobGroup {
  const OpBase* op = nullptr;
  CaseInfo info;
  std::vector<std::string> hows;  // implementations, as the op lists them
};

// Throws Error(usage) for unknown ops, implementations, keys, and bad expressions. May return
// nothing.
std::vector<JobGroup> select_jobs(const Ops& ops, const Selection& selection);

std::string impl_name(const OpBase& op, const std::string& how);  // "rmsnorm.cpu_simd"
std::string job_name(const OpBase& op, const std::string& how,
                     const CaseInfo& info);     // "rmsnorm.cpu_simd/T=..."
std::string device_of(const std::string& how);  // "cpu" | "cuda"
// What stands in the rows' `device` column: "cpu", the GPU's name, "cuda_emulated", or "cuda" where there is none.
std::string device_column(const std::string& how);
const char* size_name(Size s);
const char* cache_name(CacheState c);

// "1024:65536:*2" -> 1024 2048 ... 65536; "1:10:+3" or "1:10:3" -> 1 4 7 10; "a:b" -> step 1; "5"
// -> 5. Comma-separated lists of those. Throws Error(usage).
std::vector<int64_t> parse_int_list(const std::string& text, const std::string& where);
// "T=1:4:*2,d=7168" -> {"T=1,d=7168", "T=2,d=7168", "T=4,d=7168"}
std::vector<std::string> expand_case(const std::string& text);

}  // namespace v3b::bench
