#include "bench/harness/check.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <fstream>
#include <new>

#include "bench/harness/fill_rng.h"
#include "kernels/core/cuda_error.h"
#include "model/hash.h"

namespace v3b::bench {
namespace {

constexpr int64_t kHashChunk = 1 << 20;

const char* state_name(Support::State s) {
  switch (s) {
    case Support::State::yes:
      return "yes";
    case Support::State::unsupported:
      return "unsupported";
    case Support::State::not_built:
      return "not_built";
    case Support::State::no_device:
      return "no_device";
  }
  return "?";
}

void fail(CheckResult& r, const std::string& reason) {
  if (r.status != "failed" || r.reason.empty()) r.reason = reason;  // not over a mere note
  r.status = "failed";
}

}  // namespace

uint64_t tensor_hash(const HostTensor& t) {
  const int64_t n = t.bytes(), chunks = (n + kHashChunk - 1) / kHashChunk;
  const char* p = static_cast<const char*>(t.data());
  uint64_t sum = 0;
#pragma omp parallel for schedule(static) reduction(+ : sum) if (chunks > 1)
  for (int64_t c = 0; c < chunks; ++c) {
    const int64_t lo = c * kHashChunk, len = std::min(kHashChunk, n - lo);
    sum += mix64(model::fnv1a64({p + lo, static_cast<size_t>(len)}) ^ static_cast<uint64_t>(c));
  }
  return sum;
}

int64_t available_memory_bytes() {
  std::ifstream in("/proc/meminfo");
  std::string key, unit;
  for (int64_t kb = 0; in >> key >> kb; std::getline(in, unit))
    if (key == "MemAvailable:") return kb << 10;
  return 0;
}

double run_once(const Runner& runner) {
  if (runner.timed_run) return runner.timed_run();
  const auto t0 = std::chrono::steady_clock::now();
  runner.run();
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - t0).count();
}

void CaseChecker::check_fill(const std::string& how, Fill fill, CheckResult& result) {
  const std::string prefix = fill == Fill::exact ? "exact fill: " : "";
  DataHandle data;
  if (const auto kept = made_.extract(fill); !kept.empty()) data = std::move(kept.mapped());
  const bool fresh = data.tensors.empty();
  if (fresh) data = op_.make(info_.text, fill, seed_);
  for (HostTensor* t : data.tensors) {
    if (t->role() == Role::output) t->poison();
    if (fresh && !t->canaries_intact())
      return fail(result, prefix + "making '" + t->name() + "' wrote outside of it");
  }
  std::vector<uint64_t> before;
  for (const HostTensor* t : data.tensors)
    before.push_back(t->role() == Role::input ? tensor_hash(*t) : 0);

  {  // what it packed is gone before the reference needs memory
    const Runner runner = op_.prepare(how, data);
    result.resolved_isa = runner.resolved_isa;
    const auto t0 = std::chrono::steady_clock::now();
    runner.run();
    if (fill == Fill::real)
      result.run_seconds =
          std::chrono::duration<double>(std::chrono::steady_clock::now() - t0).count();
    if (runner.fetch) runner.fetch();
  }

  for (size_t i = 0; i < data.tensors.size(); ++i) {
    const HostTensor& t = *data.tensors[i];
    if (!t.canaries_intact()) return fail(result, prefix + "wrote outside of '" + t.name() + "'");
    if (t.role() == Role::input && tensor_hash(t) != before[i])
      return fail(result, prefix + "changed its input '" + t.name() + "'");
  }
  if (expected_.count(fill) == 0) expected_.emplace(fill, op_.reference(data));
  const Verdict v = judge(expected_.at(fill), data.tensors, [&](const std::string& output) {
    return op_.tolerance_of(how, info_.text, fill, output);
  });
  if (result.judged)
    result.verdict.merge(v);
  else
    result.verdict = v;
  result.judged = true;
  if (!v.passed) fail(result, prefix + v.reason);
  if (v.passed && result.reason.empty()) result.reason = v.note;
  const bool written = std::any_of(data.tensors.begin(), data.tensors.end(),
                                   [](const HostTensor* t) { return t->role() == Role::inout; });
  if (v.passed && !written) made_[fill] = std::move(data);
}

// Support, memory and exceptions around a job.
CheckResult CaseChecker::guarded(const std::string& how,
                                 const std::function<void(CheckResult&)>& body) {
  CheckResult result;
  try {
    const Support s = op_.support(how, info_.text);
    if (s.state != Support::State::yes) {
      result.status = state_name(s.state);
      result.reason = s.reason.empty() ? "no reason given" : s.reason;
      return result;
    }
    // The inputs, if they are still to be made, and a packed form. A tenth is left to the others on the machine.
    const double need = (made_.empty() ? 2 : 1) * op_.cost(info_.text).bytes;
    const double have = 0.9 * static_cast<double>(available_memory_bytes());
    if (have > 0 && need > have) {
      char text[128];
      std::snprintf(
          text, sizeof text,
          "needs about %.1f GB of memory, %.1f GB (nine tenths of what is free) can be had",
          need / 1e9, have / 1e9);
      result.status = "unsupported";
      result.reason = text;
      return result;
    }
    body(result);
  } catch (const TooLarge& e) {
    result.status = "unsupported";
    result.reason = e.what();
  } catch (const std::bad_alloc&) {
    result.status = "error";
    result.reason = "out of memory";
  } catch (const kern::CudaOutOfMemory& e) {
    result.status = "unsupported";
    result.reason = e.what();
  } catch (const kern::CudaFault& e) {
    result.status = "error";
    result.reason = e.what();
    result.device_lost = true;
  } catch (const std::exception& e) {
    result.status = "error";
    result.reason = e.what();
  }
  return result;
}

CheckResult CaseChecker::check(const std::string& how) {
  return guarded(how, [&](CheckResult& result) {
    result.status = "passed";
    check_fill(how, Fill::real, result);
    if (op_.has_exact_fill(info_.text)) check_fill(how, Fill::exact, result);
  });
}

CheckResult CaseChecker::run_unchecked(const std::string& how) {
  unchecked_ = true;
  return guarded(how, [&](CheckResult& result) { run_fill(how, result); });
}

void CaseChecker::run_fill(const std::string& how, CheckResult& result) {
  DataHandle data = op_.make(info_.text, Fill::real, seed_);
  for (HostTensor* t : data.tensors)
    if (t->role() == Role::output) t->poison();
  const Runner runner = op_.prepare(how, data);
  result.resolved_isa = runner.resolved_isa;
  runner.run();
  if (runner.fetch) runner.fetch();
  result.status = "unchecked";
  result.reason = "no reference was computed";
  const Verdict v = judge_real(how, data);
  if (!v.passed) fail(result, v.reason);
}

Verdict CaseChecker::judge_real(const std::string& how, const DataHandle& data) const {
  if (unchecked_) {
    Verdict v;
    v.passed = true;
    for (const HostTensor* t : data.tensors)
      for (int64_t i = 0; t->role() == Role::output && i < t->numel(); ++i)
        if (!std::isfinite(t->get(i))) {
          v.passed = false;
          v.reason = "'" + t->name() + "' is not finite at " + std::to_string(i);
          return v;
        }
    return v;
  }
  return judge(expected_.at(Fill::real), data.tensors, [&](const std::string& output) {
    return op_.tolerance_of(how, info_.text, Fill::real, output);
  });
}

}  // namespace v3b::bench
