#include "bench/harness/run.h"

#include <fmt/format.h>
#include <malloc.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>

#include "bench/harness/peaks.h"
#include "bench/harness/progress.h"
#include "bench/harness/running_marker.h"
#include "kernels/core/cpu.h"
#include "kernels/core/cuda.h"
#include "kernels/core/cuda_error.h"
#include "reports/machine.h"

namespace v3b::bench {
namespace {

constexpr const char *kRead = "read", *kCopy = "copy", *kWrite = "write", *kGpu = "gpu_";
constexpr const char* kEmulated = "emulated: times mean nothing";
constexpr int kSettleProbes = 12;

std::optional<double> finite(double v) {
  return std::isfinite(v) ? std::optional<double>(v) : std::nullopt;
}

rep::Row base_row(const JobGroup& g, const std::string& how, const RunOptions& o) {
  rep::Row r;
  r.op = g.op->name();
  r.impl = impl_name(*g.op, how);
  r.peer = g.op->is_baseline(how) ? 1 : 0;
  r.case_text = g.info.text;
  r.dtype = g.info.dtype;
  r.cache_state = cache_name(g.info.cache);
  r.params = fmt::format("seed={};threads={};fills={}", o.seed, kern::num_threads(),
                         g.op->has_exact_fill(g.info.text) ? "real+exact" : "real");
  // Waking threads that sleep between regions costs some 45 us a call on a virtual machine, and is in the times.
  if (const char* wait = std::getenv("OMP_WAIT_POLICY");
      wait != nullptr && device_of(how) != "cuda")
    r.params += fmt::format(";wait={}", wait);
  r.repro =
      fmt::format("v3bench {} --op {} --impl {} --case {} --seed {} --threads {}",
                  o.time ? "bench" : "check", r.op, how, g.info.text, o.seed, kern::num_threads());
  if (o.time) r.repro += fmt::format(" --cache {}", r.cache_state);
  if (o.unchecked) r.repro += " --unchecked";
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

// The peaks that bound a case on its device, by probe name.
struct RoofNames {
  std::string read, copy, write, compute;
};
RoofNames roof_names(const JobGroup& g, const Cost& cost, bool cuda) {
  if (!cuda) return {kRead, kCopy, kWrite, cost.compute_roof};
  // Where operands are E4M3, the GPU has a faster instruction than the CPU's widening to bf16.
  const bool fp8 =
      g.op->name().rfind("fp8", 0) == 0 || g.info.text.find("dtype=f8e4m3") != std::string::npos;
  const std::string compute = cost.compute_roof;
  return {kGpu + std::string(kRead), kGpu + std::string(kCopy), kGpu + std::string(kWrite),
          kGpu + (compute == "bf16" && fp8 ? "fp8" : compute)};
}

// The roof of a case: which peak binds, and the least seconds that it allows. The memory roof does
// not bind data that stays in the caches. What is written costs as much as in a copy, which reads
// the same number of bytes beside it: 2 * written bytes at the copy bandwidth, the rest at the read
// bandwidth. Its name is that of the part that takes 90% of the time, else both. Where more is written than read, what is
// written cannot take less time than stores alone do, if that rate was measured (a copy's two directions overlap; eight
// rows written for one read, as in moe_dispatch, have nothing to overlap with).
bool writes_most(const Cost& cost) { return 2 * cost.written > cost.bytes; }
struct Roof {
  std::string name;
  double seconds = 0;  // 0: no roof
};
Roof roof_of(const Cost& cost, const CaseInfo& info, const RoofNames& names, const Peaks& peaks) {
  const double compute = roof_rate(peaks, names.compute), read = roof_rate(peaks, names.read),
               copy = roof_rate(peaks, names.copy);
  const double t_compute = compute > 0 ? cost.flop / compute : 0;
  double t_read = 0, t_copy = 0;
  if (info.cache == CacheState::cold && read > 0) {
    // More written than read: all of it counts as copied.
    const double copied = copy > 0 ? std::min(cost.bytes, 2 * cost.written) : 0;
    t_copy = copied > 0 ? copied / copy : 0;
    t_read = (cost.bytes - copied) / read;
  }
  const double write = writes_most(cost) ? roof_rate(peaks, names.write) : 0;
  const double t_write = info.cache == CacheState::cold && write > 0 ? cost.written / write : 0;
  const double t_memory = std::max(t_read + t_copy, t_write);
  if (t_compute <= 0 && t_memory <= 0) return {};
  if (t_memory < t_compute) return {names.compute, t_compute};
  if (t_write > t_read + t_copy) return {names.write, t_write};
  return {t_read >= 0.9 * t_memory   ? names.read
          : t_copy >= 0.9 * t_memory ? names.copy
                                     : names.read + "+" + names.copy,
          t_memory};
}

void remember_best(const Peaks& peaks) {
  for (const auto& [key, value] : peaks) {
    double& best = rep::machine_card().peaks[key];
    best = std::max(best, value);
  }
}

// "read+copy" names two peaks.
std::vector<std::string> parts_of(const std::string& roof) {
  const size_t plus = roof.find('+');
  if (plus == std::string::npos) return {roof};
  return {roof.substr(0, plus), roof.substr(plus + 1)};
}

// One probe on a shared machine may fall into a bad moment: before a row is called faster than
// possible, the peak gets the best of this run and some more probes.
Roof settled_roof(double seconds, const Cost& cost, const CaseInfo& info, const RoofNames& names,
                  Peaks& peaks, double margin) {
  Roof roof = roof_of(cost, info, names, peaks);
  for (int i = 0; i < kSettleProbes && roof.seconds > seconds * (1 + margin); ++i) {
    if (i == 0)
      for (auto& [key, value] : peaks) value = std::max(value, rep::machine_card().peaks[key]);
    else
      for (const std::string& part : parts_of(roof.name)) probe_peak(part, peaks, 2);
    remember_best(peaks);
    roof = roof_of(cost, info, names, peaks);
  }
  return roof;
}

void add_times(rep::Row& r, const TimeResult& t, const Cost& cost, const CaseInfo& info,
               const RoofNames& names, Peaks& peaks, double margin) {
  const SampleStats s = summarize(t.samples_us);
  r.samples = s.count;
  r.stop_reason = t.stop_reason;
  r.min_us = s.min;
  r.q1_us = s.q1;
  r.median_us = s.median;
  r.q3_us = s.q3;
  r.stdrel_pct = s.stdrel_pct;
  r.sm_clock_mhz = t.load.sm_clock_mhz;
  r.mem_clock_mhz = t.load.mem_clock_mhz;
  r.gpu_temperature_c = t.load.temperature_c;
  r.gpu_power_w = t.load.power_w;
  r.throttle = t.load.throttle;
  r.energy_mj = t.load.energy_mj;
  const double seconds = s.median * 1e-6;
  if (!(seconds > 0)) return;
  if (cost.flop > 0) r.gflop_s = cost.flop / seconds * 1e-9;
  if (cost.bytes > 0) r.gb_s = cost.bytes / seconds * 1e-9;
  const Roof roof = settled_roof(seconds, cost, info, names, peaks, margin);
  if (roof.seconds <= 0) return;
  r.roof = roof.name.rfind(kGpu, 0) == 0 ? roof.name.substr(std::string(kGpu).size()) : roof.name;
  r.pct_of_roof = 100 * roof.seconds / seconds;
  if (!(roof.seconds <= seconds * (1 + margin))) {
    r.status = "suspect";
    r.reason = fmt::format("faster than the measured {} peak allows by {:.0f}%", r.roof,
                           *r.pct_of_roof - 100);
  }
}

void probe_roofs(const RoofNames& names, const Cost& cost, Peaks& peaks) {
  probe_peak(names.read, peaks);
  if (cost.written > 0) probe_peak(names.copy, peaks);
  if (writes_most(cost)) probe_peak(names.write, peaks);
  probe_peak(names.compute, peaks);
  if (names.compute == "bf16" && roof_instruction("bf16").empty()) probe_peak("f32", peaks);
  if (names.compute == "gpu_fp8") probe_peak("gpu_bf16", peaks);
  remember_best(peaks);
}

void count(RunSummary& s, const rep::Row& r) {
  ++s.jobs;
  if (r.timed()) ++s.timed;
  if (r.status == "passed")
    ++s.passed;
  else if (r.status == "failed")
    ++s.failed;
  else if (r.status == "unchecked")
    ++s.unchecked;
  else if (r.status == "suspect")
    ++s.suspect;
  else if (r.status == "error")
    ++s.errors;
  else
    ++s.not_run;
}

struct GroupRows {
  std::vector<rep::Row>
      rows;  // of the group's first implementations: all, unless the device was lost
  std::string device_lost_in;
};

rep::Row& row_of(std::vector<rep::Row>& rows, const JobGroup& g, const std::string& how) {
  return *std::find_if(rows.begin(), rows.end(),
                       [&](const rep::Row& x) { return x.impl == impl_name(*g.op, how); });
}

// Times some implementations of one device together; where device memory does not hold all of them, one by one.
std::vector<TimeResult> time_together_or_alone(const JobGroup& g,
                                               const std::vector<std::string>& hows, Timer& timer,
                                               const CaseChecker& checker,
                                               std::vector<rep::Row>& rows) {
  std::vector<TimeResult> times;
  try {
    return timer.time_group(*g.op, g.info, hows, checker);
  } catch (const kern::CudaOutOfMemory& e) {
    if (hows.size() == 1) {
      rep::Row& r = row_of(rows, g, hows[0]);
      r.status = "unsupported";
      r.reason = std::string("passed, but for timing: ") + e.what();
      return {};
    }
  } catch (const std::exception& e) {
    for (const auto& how : hows) {
      rep::Row& r = row_of(rows, g, how);
      r.status = "error";
      r.reason = std::string("timing: ") + e.what();
    }
    return {};
  }
  for (const auto& how : hows)
    for (auto& t : time_together_or_alone(g, {how}, timer, checker, rows)) {
      times.push_back(std::move(t));
      if (times.back().device_lost) return times;
    }
  return times;
}

// The timing half of a group, for the implementations of one device.
void time_device(const JobGroup& g, const std::vector<std::string>& hows, bool cuda,
                 const RunOptions& o, Timer& timer, const CaseChecker& checker, GroupRows& out) {
  if (hows.empty()) return;
  const Cost cost = g.op->cost(g.info.text);
  const RoofNames names = roof_names(g, cost, cuda);
  Peaks peaks;
  probe_roofs(names, cost, peaks);
  const auto times = time_together_or_alone(g, hows, timer, checker, out.rows);
  for (const auto& t : times)
    if (t.device_lost) out.device_lost_in = job_name(*g.op, t.how, g.info);
  if (out.device_lost_in.empty()) probe_roofs(names, cost, peaks);
  for (const auto& t : times) {
    rep::Row& r = row_of(out.rows, g, t.how);
    if (!t.error.empty()) {
      r.status = "error", r.reason = "timing: " + t.error;
      if (t.device_lost) r.stop_reason = rep::kFaulted;
    } else if (!t.failure.empty()) {
      r.status = "failed", r.reason = t.failure;
    } else if (out.device_lost_in.empty()) {
      add_times(r, t, cost, g.info, names, peaks, o.suspect_margin);
    }
  }
}

GroupRows run_group(const JobGroup& g, const RunOptions& o, Timer* timer, RunningMarker& marker,
                    Progress& progress) {
  CaseChecker checker(*g.op, g.info, o.seed);
  const Cost cost = g.op->cost(g.info.text);
  const bool emulated = kern::cuda_device().mode == kern::CudaMode::emulated;
  GroupRows out;
  std::vector<std::string> to_time[2];  // CPU, CUDA
  for (const auto& how : g.hows) {
    const bool cuda = device_of(how) == "cuda";
    progress.show("check " + job_name(*g.op, how, g.info));
    marker.set(job_name(*g.op, how, g.info));
    rep::Row r = base_row(g, how, o);
    CheckResult check;
    if (o.time && !g.info.check_only && cuda && emulated)
      check.status = "no_device", check.reason = kEmulated;
    else
      check = o.unchecked ? checker.run_unchecked(how) : checker.check(how);
    add_verdict(r, check);
    if (cost.flop > 0) r.flop = cost.flop;
    if (cost.bytes > 0) r.bytes = cost.bytes;
    if (r.status == "passed" || r.status == "unchecked") to_time[cuda].push_back(how);
    // Says that nothing is left to do, so that --resume keeps the row.
    if (o.time && g.info.check_only && r.status == "passed") r.stop_reason = "check_only";
    if (check.device_lost) r.stop_reason = rep::kFaulted;
    out.rows.push_back(std::move(r));
    progress.advance(o.time && !g.info.check_only ? 0.5 : 1);
    if (check.device_lost) {
      out.device_lost_in = job_name(*g.op, how, g.info);
      return out;
    }
  }
  if (timer == nullptr || g.info.check_only) return out;
  progress.show("time " + g.op->name() + "/" + g.info.text);
  for (const bool cuda : {false, true})
    time_device(g, to_time[cuda], cuda, o, *timer, checker, out);
  progress.advance(0.5 * static_cast<double>(g.hows.size()));
  return out;
}

// A job that the run before did not survive: its row, once.
rep::Row died_row(const JobGroup& g, const std::string& how, const RunOptions& o) {
  rep::Row r = base_row(g, how, o);
  r.status = "error";
  r.reason = "the process ended within this job (a fault, or killed)";
  r.stop_reason = rep::kFaulted;
  return r;
}

}  // namespace

RunSummary run_jobs(const std::vector<JobGroup>& groups, const RunOptions& options,
                    rep::CsvWriter* out, const std::function<void(const rep::Row&)>& on_row) {
  RunSummary summary;
  const std::string marker_path = out != nullptr ? out->path() + ".running" : "";
  const std::string left = out != nullptr ? RunningMarker::take(marker_path) : "";
  const std::string died = options.resume ? left : "";
  RunningMarker marker(marker_path);
  std::vector<JobGroup> todo;
  double total = 0;
  const auto finished = [&](const std::string& how, const rep::Row& r) {
    if (out != nullptr) out->write(r.record(rep::identity(device_column(how))));
    count(summary, r);
    on_row(r);
  };
  for (JobGroup g : groups) {
    if (out != nullptr) {
      std::erase_if(g.hows, [&](const std::string& how) {
        rep::Record key = base_row(g, how, options).record(rep::identity(device_column(how)));
        const bool done = out->has(key);
        summary.skipped += done;
        if (!done && job_name(*g.op, how, g.info) == died) {
          finished(how, died_row(g, how, options));
          return true;
        }
        return done;
      });
    }
    total += static_cast<double>(g.hows.size());
    if (!g.hows.empty()) todo.push_back(std::move(g));
  }
  Progress progress(options.time ? "bench" : "check", total);
  std::unique_ptr<Timer> timer;
  const JobGroup* current = nullptr;
  if (options.time) {
    TimeOptions timing = options.timing;
    timing.on_job = [&](const std::string& how) {
      marker.set(job_name(*current->op, how, current->info));
    };
    timer = std::make_unique<Timer>(timing);
  }
  for (const auto& g : todo) {
    current = &g;
    const GroupRows done = run_group(g, options, timer.get(), marker, progress);
    // What a case freed goes back to the system: after hundreds of cases the heap kept 8 GB in pieces, and models of 8 GB
    // found too little memory.
    malloc_trim(0);
    progress.clear();
    for (size_t i = 0; i < done.rows.size(); ++i) finished(g.hows[i], done.rows[i]);
    summary.device_lost_in = done.device_lost_in;
    if (!summary.device_lost_in.empty()) break;
  }
  progress.finish();
  return summary;
}

}  // namespace v3b::bench
