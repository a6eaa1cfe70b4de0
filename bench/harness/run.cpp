#include "bench/harness/run.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>

#include "bench/harness/peaks.h"
#include "bench/harness/progress.h"
#include "kernels/core/cpu.h"
#include "reports/machine.h"

namespace v3b::bench {
namespace {

constexpr const char* kRead = "read";
constexpr const char* kCopy = "copy";
constexpr const char* kMixed = "read+copy";
constexpr int kSettleProbes = 12;

std::optional<double> finite(double v) {
  return std::isfinite(v) ? std::optional<double>(v) : std::nullopt;
}

rep::Row base_row(const JobGroup& g, const std::string& how, const RunOptions& o) {
  rep::Row r;
  r.op = g.op->name();
  r.impl = impl_name(*g.op, how);
  r.case_text = g.info.text;
  r.dtype = g.info.dtype;
  r.cache_state = cache_name(g.info.cache);
  r.params = fmt::format("seed={};threads={};fills={}", o.seed, kern::num_threads(),
                         g.op->has_exact_fill(g.info.text) ? "real+exact" : "real");
  r.repro =
      fmt::format("v3bench {} --op {} --impl {} --case {} --seed {} --threads {}",
                  o.time ? "bench" : "check", r.op, how, g.info.text, o.seed, kern::num_threads());
  if (o.time) r.repro += fmt::format(" --cache {}", r.cache_state);
  return r;
}

void add_verdict(rep::Row& r, const CheckResult& c) {
  r.status = c.status;
  r.reason = c.reason;
  r.resolved_isa = c.resolved_isa;
  if (!c.judged) return;
  r.max_abs_err = finite(c.verdict.max_abs_err);
  r.max_rel_err = finite(c.verdict.max_rel_err);
  r.rel_fro_err = finite(c.verdict.rel_fro_err);
  r.err_over_bound = finite(c.verdict.err_over_bound);
  r.worst_index = c.verdict.worst_index;
  r.route_flips = c.verdict.route_flips;
}

// The roof of a case: which peak binds, and the least seconds that it allows. The memory roof does
// not bind data that stays in the caches. What is written costs as much as in a copy, which reads
// the same number of bytes beside it: 2 * written bytes at the copy bandwidth, the rest at the read
// bandwidth. Its name is that of the part that takes 90% of the time, else both.
struct Roof {
  std::string name;
  double seconds = 0;  // 0: no roof
};
Roof roof_of(const Cost& cost, const CaseInfo& info, const Peaks& peaks) {
  const double compute = roof_rate(peaks, cost.compute_roof), read = roof_rate(peaks, kRead),
               copy = roof_rate(peaks, kCopy);
  const double t_compute = compute > 0 ? cost.flop / compute : 0;
  double t_read = 0, t_copy = 0;
  if (info.cache == CacheState::cold && read > 0) {
    // More written than read: all of it counts as copied (a pure write is no slower than that).
    const double copied = copy > 0 ? std::min(cost.bytes, 2 * cost.written) : 0;
    t_copy = copied > 0 ? copied / copy : 0;
    t_read = (cost.bytes - copied) / read;
  }
  const double t_memory = t_read + t_copy;
  if (t_compute <= 0 && t_memory <= 0) return {};
  if (t_memory < t_compute) return {cost.compute_roof, t_compute};
  const char* name = t_read >= 0.9 * t_memory ? kRead : t_copy >= 0.9 * t_memory ? kCopy : kMixed;
  return {name, t_memory};
}

void remember_best(const Peaks& peaks) {
  for (const auto& [key, value] : peaks) {
    double& best = rep::machine_card().peaks[key];
    best = std::max(best, value);
  }
}

std::vector<const char*> parts_of(const std::string& roof) {
  if (roof == kMixed) return {kRead, kCopy};
  if (roof == kRead || roof == kCopy) return {roof == kRead ? kRead : kCopy};
  for (const char* which : {"f32", "f64", "bf16", "int8"})
    if (roof == which) return {which};
  return {};
}

// One probe on a shared machine may fall into a bad moment: before a row is called faster than
// possible, the peak gets the best of this run and some more probes.
Roof settled_roof(double seconds, const Cost& cost, const CaseInfo& info, Peaks& peaks,
                  double margin) {
  Roof roof = roof_of(cost, info, peaks);
  for (int i = 0; i < kSettleProbes && roof.seconds > seconds * (1 + margin); ++i) {
    if (i == 0)
      for (auto& [key, value] : peaks) value = std::max(value, rep::machine_card().peaks[key]);
    else
      for (const char* part : parts_of(roof.name)) probe_peak(part, peaks, 2);
    remember_best(peaks);
    roof = roof_of(cost, info, peaks);
  }
  return roof;
}

void add_times(rep::Row& r, const TimeResult& t, const Cost& cost, const CaseInfo& info,
               Peaks& peaks, double margin) {
  const SampleStats s = summarize(t.samples_us);
  r.samples = s.count;
  r.stop_reason = t.stop_reason;
  r.min_us = s.min;
  r.q1_us = s.q1;
  r.median_us = s.median;
  r.q3_us = s.q3;
  r.stdrel_pct = s.stdrel_pct;
  const double seconds = s.median * 1e-6;
  if (!(seconds > 0)) return;
  if (cost.flop > 0) r.gflop_s = cost.flop / seconds * 1e-9;
  if (cost.bytes > 0) r.gb_s = cost.bytes / seconds * 1e-9;
  const Roof roof = settled_roof(seconds, cost, info, peaks, margin);
  if (roof.seconds <= 0) return;
  r.roof = roof.name;
  r.pct_of_roof = 100 * roof.seconds / seconds;
  if (!(roof.seconds <= seconds * (1 + margin))) {
    r.status = "suspect";
    r.reason = fmt::format("faster than the measured {} peak allows by {:.0f}%", r.roof,
                           *r.pct_of_roof - 100);
  }
}

void probe_roofs(const JobGroup& g, Peaks& peaks) {
  const std::string compute = g.op->cost(g.info.text).compute_roof;
  probe_peak(kRead, peaks);
  if (g.op->cost(g.info.text).written > 0) probe_peak(kCopy, peaks);
  probe_peak(compute, peaks);
  if (compute == "bf16" && roof_instruction("bf16").empty()) probe_peak("f32", peaks);
  remember_best(peaks);
}

void count(RunSummary& s, const rep::Row& r) {
  ++s.jobs;
  if (r.timed()) ++s.timed;
  if (r.status == "passed")
    ++s.passed;
  else if (r.status == "failed")
    ++s.failed;
  else if (r.status == "suspect")
    ++s.suspect;
  else if (r.status == "error")
    ++s.errors;
  else
    ++s.not_run;
}

std::vector<rep::Row> run_group(const JobGroup& g, const RunOptions& o, Timer* timer,
                                Progress& progress) {
  CaseChecker checker(*g.op, g.info, o.seed);
  const Cost cost = g.op->cost(g.info.text);
  std::vector<rep::Row> rows;
  std::vector<std::string> to_time;
  for (const auto& how : g.hows) {
    progress.show("check " + job_name(*g.op, how, g.info));
    rep::Row r = base_row(g, how, o);
    add_verdict(r, checker.check(how));
    if (cost.flop > 0) r.flop = cost.flop;
    if (cost.bytes > 0) r.bytes = cost.bytes;
    if (r.status == "passed") to_time.push_back(how);
    // Says that nothing is left to do, so that --resume keeps the row.
    if (o.time && g.info.check_only && r.status == "passed") r.stop_reason = "check_only";
    rows.push_back(std::move(r));
    progress.advance(o.time && !g.info.check_only ? 0.5 : 1);
  }
  if (timer == nullptr || g.info.check_only || to_time.empty()) {
    if (timer != nullptr && !g.info.check_only)
      progress.advance(0.5 * static_cast<double>(g.hows.size()));
    return rows;
  }
  progress.show("time " + g.op->name() + "/" + g.info.text);
  Peaks peaks;
  probe_roofs(g, peaks);
  std::vector<TimeResult> times;
  try {
    times = timer->time_group(*g.op, g.info, to_time, checker);
  } catch (const std::exception& e) {
    for (auto& r : rows)
      if (r.status == "passed") r.status = "error", r.reason = std::string("timing: ") + e.what();
    return rows;
  }
  probe_roofs(g, peaks);
  for (const auto& t : times) {
    auto& r = *std::find_if(rows.begin(), rows.end(),
                            [&](const rep::Row& x) { return x.impl == impl_name(*g.op, t.how); });
    if (!t.failure.empty())
      r.status = "failed", r.reason = t.failure;
    else
      add_times(r, t, cost, g.info, peaks, o.suspect_margin);
  }
  progress.advance(0.5 * static_cast<double>(g.hows.size()));
  return rows;
}

}  // namespace

RunSummary run_jobs(const std::vector<JobGroup>& groups, const RunOptions& options,
                    rep::CsvWriter* out, const std::function<void(const rep::Row&)>& on_row) {
  RunSummary summary;
  std::vector<JobGroup> todo;
  double total = 0;
  for (JobGroup g : groups) {
    if (out != nullptr) {
      std::erase_if(g.hows, [&](const std::string& how) {
        rep::Record key = base_row(g, how, options).record(rep::identity(device_of(how)));
        const bool done = out->has(key);
        summary.skipped += done;
        return done;
      });
    }
    total += static_cast<double>(g.hows.size());
    if (!g.hows.empty()) todo.push_back(std::move(g));
  }
  Progress progress(options.time ? "bench" : "check", total);
  std::unique_ptr<Timer> timer;
  if (options.time) timer = std::make_unique<Timer>(options.timing);
  for (const auto& g : todo) {
    const auto rows = run_group(g, options, timer.get(), progress);
    for (size_t i = 0; i < rows.size(); ++i) {
      if (out != nullptr) out->write(rows[i].record(rep::identity(device_of(g.hows[i]))));
      count(summary, rows[i]);
      progress.clear();
      on_row(rows[i]);
    }
  }
  progress.finish();
  return summary;
}

}  // namespace v3b::bench
