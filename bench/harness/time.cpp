#include "bench/harness/time.h"

#include <benchmark/benchmark.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstring>
#include <fstream>
#include <iostream>
#include <numeric>

#include "bench/harness/jobs.h"
#include "bench/harness/peaks.h"
#include "kernels/core/cuda.h"
#include "kernels/core/cuda_error.h"
#include "kernels/core/cuda_peaks.h"
#include "model/error.h"

namespace v3b::bench {
namespace {

using Clock = std::chrono::steady_clock;

// Rotated bytes in units of the last-level cache: at least, or caches are read over between runs instead; and at most. The
// last level keeps some of what was read three times its size ago (Zen 4: a GEMV of 45 MB ran 14% faster with three
// copies of it than with six), so more is better where memory and time permit; the read probe's own is eight.
constexpr double kColdFactor = 3, kColdEnough = 8;
constexpr double kMemoryShare = 0.3;                 // of the free memory for rotated copies
constexpr int64_t kMaxCopyBytes = int64_t{3} << 29;  // 1.5 GiB
// More copies than these, and caches are read over between runs instead: copies that cost no matter
// what, seconds that more of them may take, and most of all.
constexpr double kFreeCopies = 8, kCopySeconds = 0.6, kMaxCopies = 4096;
constexpr int64_t kMaxIterations = 20000;  // samples of one round

double seconds_since(Clock::time_point t0) {
  return std::chrono::duration<double>(Clock::now() - t0).count();
}

// The inputs that a group rotates over, with every implementation prepared on each copy.
struct Rotation {
  std::vector<DataHandle> copies;
  std::vector<std::vector<Runner>> runners;  // [impl][copy]
  bool scrub = false, cuda = false;
  bool device_lost = false;
  size_t next = 0;

  void empty_caches() const {
    if (cuda)
      kern::cuda_empty_l2();
    else
      scrub_caches();
  }
};

int64_t tensor_bytes(const DataHandle& d) {
  int64_t n = 0;
  for (const HostTensor* t : d.tensors) n += t->bytes();
  return n;
}

// Copies until their touched bytes exceed the device's caches several times, as far as memory and time
// permit.
Rotation make_rotation(const OpBase& op, const CaseInfo& info, const std::vector<std::string>& hows,
                       uint64_t seed, const CaseChecker& checker) {
  Rotation r;
  r.cuda = !hows.empty() && device_of(hows[0]) == "cuda";
  r.runners.resize(hows.size());
  const auto add_copy = [&] {
    r.copies.push_back(op.make(info.text, Fill::real, seed));
    for (size_t i = 0; i < hows.size(); ++i)
      r.runners[i].push_back(op.prepare(hows[i], r.copies.back()));
  };
  r.copies.reserve(static_cast<size_t>(
      kMaxCopies));  // runners may keep addresses of what a handle owns, not of the handle
  const auto t0 = Clock::now();
  add_copy();
  checker
      .forget_inputs();  // after the copy: what both share (a model's weights) was not made again
  if (info.cache != CacheState::cold) return r;
  const double each_seconds = seconds_since(t0);
  const double tensors = static_cast<double>(std::max<int64_t>(1, tensor_bytes(r.copies[0])));
  const double least = op.cost(info.text).bytes, touched = std::clamp(least, 1.0, tensors);
  // A model's weights are in no tensor, but every copy has them packed.
  const double held = std::max(tensors, least);
  const double cache =
      static_cast<double>(r.cuda && kern::cuda_device().l2_bytes > 0 ? kern::cuda_device().l2_bytes
                                                                     : last_level_cache_bytes());
  const double needed = std::ceil(kColdFactor * cache / touched),
               wanted = std::ceil(kColdEnough * cache / touched);
  // Each implementation may keep a packed form as large as the data beside it.
  const double impls = static_cast<double>(hows.size());
  const double memory =
      kMemoryShare * static_cast<double>(available_memory_bytes()) / (1.0 + 0.5 * impls);
  double by_memory = std::floor(std::min<double>(kMaxCopyBytes, memory) / held);
  if (r.cuda)  // every implementation has a mirror of its own beside the packed form
    by_memory = std::min(
        by_memory, 1 + std::floor(kMemoryShare * static_cast<double>(kern::cuda_free_bytes()) /
                                  (1.5 * impls * held)));
  const double by_time =
      std::max<double>(kFreeCopies, std::floor(kCopySeconds / std::max(each_seconds, 1e-7)));
  const double copies = std::min({wanted, by_memory, by_time, kMaxCopies});
  r.scrub = copies < needed;
  if (r.scrub) return r;
  try {
    for (int i = 1; i < static_cast<int>(copies); ++i) add_copy();
  } catch (const kern::CudaOutOfMemory&) {  // caches are emptied between runs instead
    for (auto& runners : r.runners) runners.resize(1);
    r.copies.resize(1);
    r.scrub = true;
  }
  return r;
}

std::vector<std::byte> output_bytes(const DataHandle& d) {
  std::vector<std::byte> all;
  for (const HostTensor* t : d.tensors) {
    if (t->role() != Role::output) continue;
    const auto* p = static_cast<const std::byte*>(t->data());
    all.insert(all.end(), p, p + t->bytes());
  }
  return all;
}

// One implementation's job within a group.
struct Job {
  std::string how;
  size_t index = 0;
  std::vector<std::vector<double>> calls;  // samples (us) of each call of the benchmark function
  std::vector<std::byte> good;             // outputs that were judged right
  std::string failure, error;
  bool device_lost = false;

  // Outputs of copy `c`: the same bytes as a judged run, or judged now.
  void verify(const CaseChecker& checker, const Rotation& r, size_t c) {
    for (const HostTensor* t : r.copies[c].tensors)
      if (!t->canaries_intact()) failure = "timed run wrote outside of '" + t->name() + "'";
    std::vector<std::byte> now = output_bytes(r.copies[c]);
    if (!failure.empty() || (!good.empty() && now == good)) return;
    const Verdict v = checker.judge_real(how, r.copies[c]);
    if (!v.passed)
      failure = "after timing: " + v.reason;
    else if (good.empty())
      good = std::move(now);
  }

  void threw(Rotation& r, const std::exception& e) {
    error = e.what();
    device_lost = dynamic_cast<const kern::CudaFault*>(&e) != nullptr;
    r.device_lost = r.device_lost || device_lost;
  }
  // A job that threw, or whose device is gone, does nothing any more.
  void round(Rotation& r, const CaseChecker& checker, benchmark::State& state) {
    if (error.empty() && !r.device_lost) {
      try {
        return samples(r, checker, state);
      } catch (const std::exception& e) {
        threw(r, e);
      }
    }
    state.SkipWithError(error.empty() ? "the device is lost" : error.c_str());
  }

  // `n` samples in turn over the copies, outputs poisoned before and judged after, outside of the
  // times.
  void samples(Rotation& r, const CaseChecker& checker, benchmark::State& state) {
    const size_t touched = std::min(r.copies.size(), static_cast<size_t>(state.max_iterations));
    const size_t first = r.next;
    for (size_t k = 0; k < touched; ++k)
      for (HostTensor* t : r.copies[(first + k) % r.copies.size()].tensors)
        if (t->role() == Role::output) t->poison();
    for (size_t k = 0; k < touched; ++k)
      if (const Runner& n = runner(r, (first + k) % r.copies.size()); n.poison) n.poison();
    calls.emplace_back();
    calls.back().reserve(static_cast<size_t>(state.max_iterations));
    if (r.copies.size() == 1 && !r.scrub)
      run_once(runner(r, 0));  // hot: the poison left the caches cold
    for (auto _ : state) {
      const size_t c = r.next++ % r.copies.size();
      if (r.scrub) r.empty_caches();
      const double s = run_once(runner(r, c));
      state.SetIterationTime(s);
      calls.back().push_back(s * 1e6);
    }
    for (size_t k = 0; k < touched; ++k) {
      const size_t c = (first + k) % r.copies.size();
      if (runner(r, c).fetch) runner(r, c).fetch();
      verify(checker, r, c);
    }
    if (!failure.empty()) state.SkipWithError(failure.c_str());
  }
  const Runner& runner(const Rotation& r, size_t c) const { return r.runners[index][c]; }
};

// Wall seconds of one sample (with its scrubbing) after a warm-up.
double estimate_seconds(Rotation& r, const Job& job) {
  run_once(job.runner(r, r.next++ % r.copies.size()));
  const auto t0 = Clock::now();
  int runs = 0;
  do {
    if (r.scrub) r.empty_caches();
    run_once(job.runner(r, r.next++ % r.copies.size()));
    ++runs;
  } while (runs < 3 && seconds_since(t0) < 0.02);
  return seconds_since(t0) / runs;
}

// Clocks and energy of a CUDA job: runs back to back for `seconds` between two looks at the energy counter, which moves
// a few times in a tenth of a second only, and looks at clocks and throttling within.
GpuLoad gpu_load(Rotation& r, const Job& job, double seconds) {
  GpuLoad load;
  if (!nvml().available()) return load;
  run_once(job.runner(r, r.next++ % r.copies.size()));
  std::optional<uint64_t> reasons;
  const auto look = [&] {
    const GpuReading g = nvml().read();
    if (g.throttle_reasons) reasons = reasons.value_or(0) | *g.throttle_reasons;
    return g;
  };
  const GpuReading before = look();
  const auto t0 = Clock::now();
  int64_t runs = 0;
  int looks = 1;
  double elapsed = 0;
  do {
    run_once(job.runner(r, r.next++ % r.copies.size()));
    ++runs;
    elapsed = seconds_since(t0);
    if (elapsed > seconds * looks / 4) look(), ++looks;
  } while (elapsed < seconds);
  const GpuReading after = look();
  load.sm_clock_mhz = after.sm_clock_mhz;
  load.mem_clock_mhz = after.mem_clock_mhz;
  load.temperature_c = after.temperature_c;
  load.power_w = after.power_w;
  if (before.energy_mj && after.energy_mj && *after.energy_mj > *before.energy_mj)
    load.energy_mj = (*after.energy_mj - *before.energy_mj) / static_cast<double>(runs);
  if (reasons) load.throttle = throttle_text(*reasons);
  return load;
}

struct ClearRegistered {  // also when something throws: the functions hold addresses of locals
  ~ClearRegistered() { benchmark::ClearRegisteredBenchmarks(); }
};

}  // namespace

SampleStats summarize(std::vector<double> v) {
  SampleStats s;
  s.count = static_cast<int64_t>(v.size());
  if (v.empty()) return s;
  std::sort(v.begin(), v.end());
  const auto quantile = [&](double q) {  // linear between order statistics
    const double at = q * static_cast<double>(v.size() - 1);
    const size_t i = static_cast<size_t>(at);
    const double f = at - static_cast<double>(i);
    return i + 1 < v.size() ? v[i] * (1 - f) + v[i + 1] * f : v[i];
  };
  s.min = v.front();
  s.q1 = quantile(0.25);
  s.median = quantile(0.5);
  s.q3 = quantile(0.75);
  const double mean = std::accumulate(v.begin(), v.end(), 0.0) / static_cast<double>(v.size());
  double sum2 = 0;
  for (double x : v) sum2 += (x - mean) * (x - mean);
  if (v.size() > 1 && mean > 0)
    s.stdrel_pct = 100 * std::sqrt(sum2 / static_cast<double>(v.size() - 1)) / mean;
  return s;
}

// Google Benchmark would open --benchmark_out anew for every group; these live as long as the
// Timer.
struct Timer::Reporters : public benchmark::BenchmarkReporter {
  std::unique_ptr<std::ofstream> file;
  std::vector<std::unique_ptr<benchmark::BenchmarkReporter>> to;
  bool started = false;

  static std::unique_ptr<benchmark::BenchmarkReporter> make(const std::string& format) {
    if (format == "json") return std::make_unique<benchmark::JSONReporter>();
    if (format == "csv") {
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wdeprecated-declarations"
      return std::make_unique<benchmark::CSVReporter>();
#pragma GCC diagnostic pop
    }
    if (format == "console")
      return std::make_unique<benchmark::ConsoleReporter>(benchmark::ConsoleReporter::OO_None);
    throw Error(ExitCode::usage, "unknown format", "--benchmark_format", "console, json or csv",
                "'" + format + "'");
  }
  void add(const std::string& format, std::ostream& out) {
    to.push_back(make(format));
    to.back()->SetOutputStream(&out);
    to.back()->SetErrorStream(&std::cerr);
  }
  bool ReportContext(const Context& context) override {
    if (!started)
      for (auto& r : to) r->ReportContext(context);
    started = true;
    return true;
  }
  void ReportRuns(const std::vector<Run>& runs) override {
    for (auto& r : to) r->ReportRuns(runs);
  }
  void Finalize() override {}  // of a group; finish() ends the file
  void finish() {
    if (started)
      for (auto& r : to) r->Finalize();
  }
};

Timer::Timer(const TimeOptions& options)
    : options_(options), reporters_(std::make_unique<Reporters>()) {
  std::vector<std::string> args = {"v3bench",
                                   "--benchmark_repetitions=" + std::to_string(options.rounds),
                                   "--benchmark_enable_random_interleaving=true"};
  std::string out, out_format = "json";
  const auto value = [](const std::string& a) {
    return a.substr(std::min(a.size(), a.find('=') + 1));
  };
  for (const auto& a : options.benchmark_args) {
    if (a.rfind("--benchmark_out=", 0) == 0)
      out = value(a);
    else if (a.rfind("--benchmark_out_format=", 0) == 0)
      out_format = value(a);
    else if (a.rfind("--benchmark_format=", 0) == 0)
      reporters_->add(value(a), std::cout);
    else {
      user_min_time_ = user_min_time_ || a.rfind("--benchmark_min_time=", 0) == 0;
      user_repetitions_ = user_repetitions_ || a.rfind("--benchmark_repetitions=", 0) == 0;
      args.push_back(a);
    }
  }
  if (!out.empty()) {
    reporters_->file = std::make_unique<std::ofstream>(out);
    if (!*reporters_->file) throw Error(ExitCode::cannot_write, "cannot write", out);
    reporters_->add(out_format, *reporters_->file);
  }
  std::vector<char*> argv;
  for (auto& a : args) argv.push_back(a.data());
  // Google Benchmark keeps this pointer and prints the name later.
  static char program[] = "v3bench";
  argv[0] = program;
  int argc = static_cast<int>(argv.size());
  argv.push_back(nullptr);
  benchmark::Initialize(&argc, argv.data());
  if (argc > 1) throw Error(ExitCode::usage, "unknown Google Benchmark flag", "", "", argv[1]);
}

Timer::~Timer() {
  reporters_->finish();
  reporters_.reset();
  benchmark::Shutdown();
}

std::vector<TimeResult> Timer::time_group(const OpBase& op, const CaseInfo& info,
                                          const std::vector<std::string>& hows,
                                          const CaseChecker& checker) {
  Rotation rotation = make_rotation(op, info, hows, options_.seed, checker);
  const ClearRegistered clear;
  std::vector<Job> jobs(hows.size());
  std::vector<TimeResult> results(hows.size());
  for (size_t i = 0; i < hows.size(); ++i) {
    jobs[i].how = results[i].how = hows[i];
    jobs[i].index = i;
    Job* job = &jobs[i];
    auto* b = benchmark::RegisterBenchmark(job_name(op, hows[i], info).c_str(),
                                           [=, this, &rotation, &checker](benchmark::State& state) {
                                             if (options_.on_job) options_.on_job(job->how);
                                             job->round(rotation, checker, state);
                                           });
    b->UseManualTime()->Unit(benchmark::kMicrosecond);
    results[i].stop_reason = "min_time";
    // Where caches are read over between runs, a minimum of kernel time would take minutes of wall
    // time.
    if (user_min_time_ && !rotation.scrub) continue;
    double each = 1;
    if (options_.on_job) options_.on_job(job->how);
    try {
      if (!rotation.device_lost) each = estimate_seconds(rotation, *job);
    } catch (const std::exception& e) {
      job->threw(rotation, e);
    }
    const double per_round = options_.job_seconds / options_.rounds;
    const double planned = std::floor(per_round / std::max(each, 1e-9));
    b->Iterations(std::clamp<int64_t>(static_cast<int64_t>(planned), 1, kMaxIterations));
    results[i].stop_reason =
        planned > static_cast<double>(kMaxIterations) ? "max_samples" : "budget";
    if (planned < 1 && !user_repetitions_) {
      b->Repetitions(
          std::clamp(static_cast<int>(3 * options_.job_seconds / each), 1, options_.rounds));
      results[i].stop_reason = "slow";
    }
  }
  benchmark::RunSpecifiedBenchmarks(reporters_.get());
  for (size_t i = 0; i < jobs.size(); ++i) {
    Job& job = jobs[i];
    if (rotation.cuda && !rotation.device_lost && job.error.empty() && job.failure.empty()) {
      try {
        results[i].load = gpu_load(rotation, job, options_.energy_seconds);
      } catch (const std::exception& e) {
        job.threw(rotation, e);
      }
    }
    results[i].failure = job.failure;
    results[i].error = job.error;
    results[i].device_lost = job.device_lost;
    if (!job.error.empty()) continue;
    // With a minimum time Google Benchmark first tries fewer iterations; those calls are not
    // samples.
    const auto& calls = jobs[i].calls;
    for (const auto& call : calls)
      if (call.size() == calls.back().size())
        results[i].samples_us.insert(results[i].samples_us.end(), call.begin(), call.end());
  }
  return results;
}

}  // namespace v3b::bench
