// Checks the implementations of one op on one case (laws 1, 2, 4, 5): poisoned outputs, canaries,
// inputs that must stay as they were, the reference only after the kernel.
#pragma once
#include <functional>
#include <map>
#include <memory>
#include <string>

#include "bench/harness/judge.h"
#include "bench/harness/op.h"

namespace v3b::bench {

struct CheckResult {
  // passed | failed | unchecked | unsupported | not_built | no_device | error
  std::string status;
  std::string reason;
  bool judged = false;  // verdict holds numbers
  Verdict verdict;      // worst over the fills
  std::string resolved_isa;
  bool device_lost = false;  // a CUDA fault: nothing more runs on the device in this process
  double run_seconds = 0;    // of the first run on `real`, cold and unprepared: an estimate only
};

class CaseChecker {
 public:
  CaseChecker(const OpBase& op, CaseInfo info, uint64_t seed)
      : op_(op), info_(std::move(info)), seed_(seed) {}

  // Each implementation gets poisoned outputs and inputs that are fresh or were found unchanged after the one before (the
  // large ones take longer to make than to use; a tensor that is read and written, or a failure, makes them anew). The
  // reference is computed once a fill, after the first kernel ran on it.
  CheckResult check(const std::string& how);
  void forget_inputs() const { made_.clear(); }  // gives their memory back

  // Judges outputs that `how` left in any Data made with Fill::real and this seed; check() must have run before.
  Verdict judge_real(const std::string& how, const DataHandle& data) const;
  // Instead of check(), where somebody else's outputs are the judge and the reference would take minutes (RunOptions::
  // unchecked): runs once, status "unchecked", or "failed" if an output is not finite. judge_real then asks for the same.
  CheckResult run_unchecked(const std::string& how);
  bool has_expected() const { return expected_.count(Fill::real) != 0; }

 private:
  void check_fill(const std::string& how, Fill fill, CheckResult& result);
  void run_fill(const std::string& how, CheckResult& result);
  CheckResult guarded(const std::string& how, const std::function<void(CheckResult&)>& body);

  const OpBase& op_;
  CaseInfo info_;
  uint64_t seed_;
  std::map<Fill, Expected> expected_;
  mutable std::map<Fill, DataHandle> made_;  // inputs that the next implementation may take
  bool unchecked_ = false;
};

uint64_t tensor_hash(const HostTensor& t);
int64_t available_memory_bytes();       // MemAvailable; 0 unknown
double run_once(const Runner& runner);  // seconds, by the device's own clock where it has one

}  // namespace v3b::bench
