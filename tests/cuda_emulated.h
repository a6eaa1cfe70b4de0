// What the tests of emulated kernels share: device copies, an op's own cases.
#pragma once
#include <gtest/gtest.h>

#include <cstdlib>
#include <string>
#include <vector>

#include "bench/harness/check.h"
#include "bench/ops/registry.h"
#include "kernels/core/cuda.h"

namespace v3b::testing {

inline const bool kEmulate = [] { return setenv("V3BENCH_CUDA", "emulate", 1) == 0; }();

template <class T>
kern::DeviceBuffer device(const std::vector<T>& v) {
  kern::DeviceBuffer b(static_cast<int64_t>(v.size() * sizeof(T)));
  kern::cuda_upload(b.data(), v.data(), b.bytes(), kern::cuda_stream());
  return b;
}
template <class T>
std::vector<T> host(const kern::DeviceBuffer& b) {
  std::vector<T> v(static_cast<size_t>(b.bytes()) / sizeof(T));
  kern::cuda_download(v.data(), b.data(), b.bytes(), kern::cuda_stream());
  return v;
}

// The op's check_only cases and the cases given, against the float64 reference.
inline void check_op(const std::string& name, const std::string& how,
                     const std::vector<std::string>& more = {}) {
  int checked = 0;
  for (const auto& op : bench::all_ops()) {
    if (op->name() != name) continue;
    std::vector<bench::CaseInfo> cases;
    for (const auto& c : op->cases())
      if (c.check_only) cases.push_back(c);
    for (const auto& text : more) cases.push_back(op->parse_case(text));
    for (const auto& c : cases) {
      bench::CaseChecker checker(*op, c, 7);
      const bench::CheckResult r = checker.check(how);
      EXPECT_EQ(r.status, "passed") << name << "." << how << " " << c.text << ": " << r.reason;
      ++checked;
    }
  }
  EXPECT_GE(checked, 1) << name;
}

}  // namespace v3b::testing
