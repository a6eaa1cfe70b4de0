#include "bench/ops/closure.h"

#include <omp.h>

#include <algorithm>
#include <chrono>
#include <map>
#include <memory>
#include <utility>

#include "bench/harness/peaks.h"
#include "kernels/core/cpu.h"
#include "kernels/forward/trace.h"

namespace v3b::bench {
namespace {

using Clock = std::chrono::steady_clock;

constexpr size_t kOwnCaches = size_t{2}
                              << 20;  // more than a core's own caches hold here (L2 of 1 to 2 MiB)

double us_since(Clock::time_point t0) {
  return std::chrono::duration<double, std::micro>(Clock::now() - t0).count();
}
double median(std::vector<double> v) {
  if (v.empty()) return 0;
  std::sort(v.begin(), v.end());
  const size_t n = v.size();
  return n % 2 == 1 ? v[n / 2] : (v[n / 2 - 1] + v[n / 2]) / 2;
}

// `bytes` in blocks of a thread each, a word of every line read by that thread.
class Displacer {
 public:
  explicit Displacer(double bytes)
      : threads_(kern::num_threads()),
        each_(std::max(kOwnCaches, size_t(bytes / threads_) / kLine * kLine)),
        blocks_(size_t(threads_), std::vector<char>(each_, 1)) {}
  void read_over() {
    int64_t sum = 0;
#pragma omp parallel num_threads(threads_) reduction(+ : sum)
    for (size_t i = 0; i < each_; i += kLine) sum += blocks_[size_t(omp_get_thread_num())][i];
    sink_ = sum;
  }

 private:
  static constexpr size_t kLine = 64;
  int threads_;
  size_t each_;
  std::vector<std::vector<char>> blocks_;
  volatile int64_t sink_ = 0;
};

class Tracing {  // of this thread, while it lives
 public:
  explicit Tracing(kern::Trace& t) { kern::set_trace(&t); }
  ~Tracing() { kern::set_trace(nullptr); }
  Tracing(const Tracing&) = delete;
  Tracing& operator=(const Tracing&) = delete;
};

}  // namespace

double Closure::explained_us() const {
  double sum = 0;
  for (const auto& c : components) sum += c.total_us;
  return sum;
}

double Closure::in_pass_us() const {
  double sum = 0;
  for (const auto& c : components) sum += c.in_pass_us;
  return sum;
}

Closure measure_closure(const spec::ForwardShape& s, ForwardWhat what, const ClosureOptions& o) {
  const auto data = make_forward_data(s, what, o.seed);
  const Runner runner = forward_runner(*data, "cpu");
  runner.run();  // lazy growth of scratch is no part of a pass
  Closure out;
  kern::Trace trace;
  trace.repetitions = o.repetitions;
  const double pass_bytes = forward_cost(s, what).bytes;
  out.between = pass_bytes > double(last_level_cache_bytes()) ? Between::all
                : pass_bytes > double(kOwnCaches)             ? Between::pass
                                                              : Between::nothing;
  std::unique_ptr<Displacer> others;
  if (out.between == Between::all) trace.before = [] { scrub_caches(); };
  if (out.between == Between::pass) {
    others = std::make_unique<Displacer>(pass_bytes);
    trace.before = [&others] { others->read_over(); };
  }

  std::vector<double> passes;
  // A call is known by its place in the pass: its samples come from all rounds.
  std::vector<std::vector<double>> alone, in_pass;
  kern::Trace in_place;
  in_place.repetitions = 0;
  for (int round = 0; round < o.rounds; ++round) {
    const auto t0 = Clock::now();
    do {
      const auto begin = Clock::now();
      runner.run();
      passes.push_back(us_since(begin));
    } while (us_since(t0) < 1e6 * o.seconds / o.rounds);
    const auto t1 = Clock::now();
    do {
      in_place.calls.clear();
      const Tracing tracing(in_place);
      runner.run();
      in_pass.resize(std::max(in_pass.size(), in_place.calls.size()));
      for (size_t i = 0; i < in_place.calls.size(); ++i)
        in_pass[i].push_back(in_place.calls[i].in_pass_us);
    } while (us_since(t1) < 1e6 * o.seconds / o.rounds);
    trace.calls.clear();
    {
      const Tracing tracing(trace);
      runner.run();
    }
    runner.run();  // back in step: not a sample
    alone.resize(std::max(alone.size(), trace.calls.size()));
    for (size_t i = 0; i < trace.calls.size(); ++i)
      alone[i].insert(alone[i].end(), trace.calls[i].alone_us.begin(),
                      trace.calls[i].alone_us.end());
  }
  out.pass_us = median(passes);
  out.passes = int64_t(passes.size());
  std::map<std::pair<std::string, std::string>, std::pair<ClosureComponent, std::vector<double>>>
      by;
  for (size_t i = 0; i < trace.calls.size(); ++i) {
    const auto& call = trace.calls[i];
    auto& [c, samples] = by[{call.component, call.shape}];
    c.component = call.component, c.shape = call.shape;
    ++c.calls;
    c.total_us += median(alone[i]);
    c.in_pass_us += median(in_pass[i]);
    samples.insert(samples.end(), alone[i].begin(), alone[i].end());
  }
  for (auto& [key, entry] : by) {
    entry.first.median_us = median(entry.second);
    out.components.push_back(entry.first);
  }
  std::stable_sort(out.components.begin(), out.components.end(),
                   [](const auto& a, const auto& b) { return a.total_us > b.total_us; });
  return out;
}

}  // namespace v3b::bench
