// list, support, check, bench, profile: loops over jobs.
#include <fmt/format.h>
#include <unistd.h>

#include <chrono>
#include <map>
#include <set>

#include "bench/harness/hardware_runs.h"
#include "bench/harness/nvml.h"
#include "bench/harness/peaks.h"
#include "bench/harness/run.h"
#include "bench/main/commands.h"
#include "bench/ops/registry.h"
#include "model/error.h"
#include "reports/machine.h"
#include "reports/table.h"

namespace v3b::cli {
namespace {

using namespace bench;

struct JobOptions {
  Common common;
  Selection selection;
  double min_time = 0.2;  // seconds a job
  int rounds = 5;
  bool csv = false;
  bool unchecked = false;
  bool brief = false;  // print only what did not pass, and the peaks
};

void add_selection(CLI::App& app, JobOptions& o) {
  app.add_option("--op", o.selection.ops, "ops, comma-separated")->delimiter(',');
  app.add_option("--impl", o.selection.impls, "implementations: cpu_simd or rmsnorm.cpu_simd")
      ->delimiter(',');
  app.add_option(
      "--case", o.selection.cases,
      "a case of any shape of one --op (v3bench list --op OP shows its keys): T=1:512:*2,d=7168; "
      "may be repeated");
  app.add_option("--filter", o.selection.filter,
                 "regular expression searched in op.implementation/case");
  app.add_option("--device", o.selection.device, "cpu or cuda")
      ->check(CLI::IsMember({"cpu", "cuda"}));
  app.add_option("--cache", o.selection.cache, "hot or cold instead of what the case says")
      ->check(CLI::IsMember({"hot", "cold"}));
  add_sizes(app, o.common);
  add_threads_seed(app, o.common);
}

std::vector<JobGroup> select(const Ops& ops, JobOptions& o) {
  o.selection.size = o.common.full ? Size::full : o.common.quick ? Size::quick : Size::standard;
  auto groups = select_jobs(ops, o.selection);
  if (groups.empty())
    throw Error(ExitCode::nothing_ran, "no job matches", "v3bench list shows all");
  return groups;
}

int run_list(JobOptions& o) {
  const Ops ops = all_ops();
  std::vector<std::vector<std::string>> rows;
  for (const auto& g : select(ops, o))
    for (const auto& how : g.hows)
      rows.push_back({impl_name(*g.op, how), g.info.text, size_name(g.info.size),
                      g.info.check_only ? "check only" : cache_name(g.info.cache),
                      g.op->is_baseline(how) ? "peer" : ""});
  fmt::print("{}\n{} jobs\n",
             rep::markdown_table({"implementation", "case", "size", "time", ""}, rows),
             rows.size());
  return 0;
}

// One line an op and implementation: the states over its cases.
int run_support(JobOptions& o) {
  const Ops ops = all_ops();
  o.common.full = true;
  o.common.quick = false;
  std::map<std::string, std::map<std::string, int64_t>>
      states;  // implementation -> "state: reason" -> cases
  std::vector<std::pair<std::string, std::string>> order;  // op, implementation
  for (const auto& g : select(ops, o))
    for (const auto& how : g.hows) {
      const std::string name = impl_name(*g.op, how);
      if (states.count(name) == 0) order.emplace_back(g.op->name(), name);
      const Support s = g.op->support(how, g.info.text);
      static const char* names[] = {"yes", "unsupported", "not built", "no device"};
      std::string text = names[static_cast<int>(s.state)];
      if (s.state != Support::State::yes) text += s.reason.empty() ? "" : ": " + s.reason;
      ++states[name][text];
    }
  std::vector<std::vector<std::string>> rows;
  for (const auto& [op, name] : order) {
    int64_t total = 0;
    for (const auto& [text, n] : states[name]) total += n;
    for (const auto& [text, n] : states[name])
      rows.push_back({op, name, text, std::to_string(n) + " of " + std::to_string(total),
                      hardware_text(name)});
  }
  const std::vector<std::string> header = {"op", "implementation", "state", "cases",
                                           "passed on GPUs"};
  if (!o.csv) {
    fmt::print("{}", rep::markdown_table(header, rows));
    return 0;
  }
  fmt::print("op,implementation,state,reason,cases,hardware\n");
  for (const auto& r : rows) {
    const size_t colon = r[2].find(": ");
    std::string reason = colon == std::string::npos ? "" : r[2].substr(colon + 2), quoted;
    for (char c : reason) quoted += c == '"' ? "\"\"" : std::string(1, c);
    fmt::print("{},{},{},\"{}\",{},\"{}\"\n", r[0], r[1], r[2].substr(0, colon), quoted, r[3],
               r[4]);
  }
  return 0;
}

std::vector<std::string> table_line(const rep::Row& r) {
  std::string verdict = r.status;
  if (r.route_flips.value_or(0) > 0) verdict += fmt::format(" ({} flips)", *r.route_flips);
  if (r.status != "passed" && !r.reason.empty()) verdict += ": " + r.reason;
  return {r.impl,
          r.case_text,
          verdict,
          rep::short_number(r.err_over_bound, 2),
          r.timed() ? r.cache_state : "",
          rep::short_time_us(r.median_us),
          rep::short_number(r.gflop_s),
          rep::short_number(r.gb_s),
          r.pct_of_roof ? rep::short_number(r.pct_of_roof, 2) + "% " + r.roof : ""};
}

int summary_code(const RunSummary& s) {
  fmt::print("{} passed, {} failed", s.passed, s.failed + s.errors);
  if (s.unchecked > 0) fmt::print(", {} timed unchecked", s.unchecked);
  if (s.suspect > 0) fmt::print(", {} suspect", s.suspect);
  if (s.not_run > 0) fmt::print(", {} not run here", s.not_run);
  if (s.skipped > 0) fmt::print(", {} already done", s.skipped);
  fmt::print("\n");
  if (s.failed + s.errors > 0) return static_cast<int>(ExitCode::check_failed);
  return static_cast<int>(
      s.passed + s.unchecked + s.suspect + s.skipped > 0 ? ExitCode::ok : ExitCode::nothing_ran);
}

int run_selected(JobOptions& o, bool time, std::vector<std::string> benchmark_args) {
  for (size_t i = 0;
       i < benchmark_args.size();) {  // Google Benchmark's own way to choose means the same here
    const std::string& a = benchmark_args[i];
    if (a.rfind("--benchmark_filter=", 0) == 0)
      o.selection.filter = a.substr(a.find('=') + 1);
    else if (a.rfind("--benchmark_list_tests", 0) == 0)
      return run_list(o);
    else {
      ++i;
      continue;
    }
    benchmark_args.erase(benchmark_args.begin() + static_cast<std::ptrdiff_t>(i));
  }
  prepare_run(o.common);
  if (o.selection.device != "cpu") describe_gpu();
  const Ops ops = all_ops();
  const auto groups = select(ops, o);
  std::unique_ptr<rep::CsvWriter> out;
  int64_t old_faults = 0;  // rows of these ops that a run before ended in
  if (!o.common.out.empty()) {
    rep::ensure_output_dir(o.common.out);
    // --resume does again what failed, and when timing also what was only checked (no stop reason);
    // other seeds and thread counts are other rows. What took the device with it is not done again.
    std::vector<std::string> keys = rep::bench_key_columns();
    keys.emplace_back("params");
    using Texts = std::set<std::string>;
    const auto keep = [&](const rep::Record& row) {
      const bool fault = row.text("stop_reason") == rep::kFaulted;
      for (const auto& g : groups) {
        if (!fault || g.op->name() != row.text("op")) continue;
        ++old_faults;
        break;
      }
      return fault;
    };
    out = std::make_unique<rep::CsvWriter>(
        o.common.out + "/bench.csv", rep::bench_columns(), keys, o.common.resume,
        time ? "stop_reason" : "status",
        time ? Texts{"", rep::kFaulted} : Texts{"failed", "error", "suspect"}, keep);
    set_interrupt_note("finished rows are in " + out->path() + ", --resume does the rest");
    rep::write_machine_json(o.common.out);
  }
  RunOptions run{
      .time = time, .seed = o.common.seed, .threads = o.common.threads, .resume = o.common.resume};
  run.unchecked = o.unchecked;
  run.timing = {.job_seconds = o.min_time,
                .rounds = o.rounds,
                .seed = o.common.seed,
                .benchmark_args = benchmark_args};
  std::vector<std::vector<std::string>> lines;
  std::map<std::string, int64_t>
      absent;  // jobs of a device that is not here, by reason: rows of the file, one line here
  const RunSummary s = run_jobs(groups, run, out.get(), [&](const rep::Row& r) {
    if (o.selection.device != "cuda" && (r.status == "not_built" || r.status == "no_device")) {
      ++absent[r.reason];
      return;
    }
    if (!o.brief || r.status != "passed") lines.push_back(table_line(r));
  });
  if (out) rep::write_machine_json(o.common.out);  // now with the peaks
  using enum rep::Align;
  if (!lines.empty())
    fmt::print("{}\n", rep::markdown_table(
                           {"implementation", "case", "verdict", "error/bound", "cache", "median",
                            "GFLOP/s", "GB/s", "of roof"},
                           lines, {left, left, left, right, left, right, right, right, right}));
  for (const auto& [reason, n] : absent) fmt::print("{} jobs: {}\n", n, reason);
  for (const auto& [key, value] : rep::machine_card().peaks)
    fmt::print("peak {} {}\n", key, rep::short_number(value));
  if (!s.device_lost_in.empty())
    fmt::print(
        stderr, "v3bench: CUDA fault in {}; nothing more runs on the device in this process{}\n",
        s.device_lost_in,
        out ? "; finished rows are in " + out->path() + ", --resume continues after it" : "");
  if (old_faults > 0) fmt::print("{} faulted in a run before and were not run again\n", old_faults);
  const int code = summary_code(s);
  return old_faults > 0 ? static_cast<int>(ExitCode::check_failed) : code;
}

// The command lines of the profilers. They run this program without its check, so that the named range holds the job's
// own run and nothing else.
void print_profilers(const std::string& impl, const std::string& same, double inputs_s,
                     double seconds) {
  const std::string run = same + " --no-check";
  if (device_of(impl.substr(impl.find('.') + 1)) == "cpu") {
    // Sampling starts when the inputs are made; a tenth later, to be sure.
    fmt::print(
        "perf record -g --delay {} {} --seconds {}\n"
        "perf report --no-children   # the calling thread's share alone: --parent "
        "v3bench_profiled_range --exclude-other\n",
        static_cast<int64_t>(1100 * inputs_s) + 100, run, seconds > 0 ? seconds : 5.0);
    return;
  }
  fmt::print("ncu --nvtx --nvtx-include \"{0}/\" --set full --import-source yes -o {0} {1}\n", impl,
             run);
  fmt::print(
      "nsys profile --trace=cuda,nvtx --capture-range=nvtx --nvtx-capture=\"{0}\" "
      "--env-var=NSYS_NVTX_PROFILER_REGISTER_ONLY=0 -o {0} {1}\n",
      impl, run);
}

}  // namespace

// The range that is to be profiled: a function of its own and never inlined, so that a profiler can
// keep what was called from here and leave out the making of inputs and the check. Not timed_run: a profiler serialises
// kernels, and the one that holds the device would wait for itself.
[[gnu::noinline]] int64_t v3bench_profiled_range(const Runner& runner, double seconds,
                                                 double* total_s) {
  const auto t0 = std::chrono::steady_clock::now();
  int64_t runs = 0;
  double elapsed = 0;
  do {
    const auto begin = std::chrono::steady_clock::now();
    runner.run();
    const auto end = std::chrono::steady_clock::now();
    *total_s += std::chrono::duration<double>(end - begin).count();
    ++runs;
    elapsed = std::chrono::duration<double>(end - t0).count();
  } while (elapsed < seconds);
  return runs;
}

namespace {

int run_profile(JobOptions& o, double seconds, bool no_check) {
  prepare_run(o.common);
  const Ops ops = all_ops();
  const auto groups = select(ops, o);
  if (groups.size() != 1 || groups[0].hows.size() != 1)
    throw Error(ExitCode::usage, "profile runs one job", "",
                "--filter, or --op, --impl and --case, that pick one",
                std::to_string(groups.size()) + " cases");
  const JobGroup& g = groups[0];
  const std::string& how = g.hows[0];
  const std::string same =
      fmt::format("v3bench profile --op {} --impl {} --case {} --seed {} --threads {}",
                  g.op->name(), how, g.info.text, o.common.seed, o.common.threads);
  std::string status = "passed", reason;
  if (no_check) {
    const Support s = g.op->support(how, g.info.text);
    if (s.state != Support::State::yes) status = "cannot run here", reason = s.reason;
  } else {
    const CheckResult check = CaseChecker(*g.op, g.info, o.common.seed).check(how);
    status = check.status, reason = check.reason;
  }
  if (status != "passed") {
    if (!no_check) print_profilers(impl_name(*g.op, how), same, 0, seconds);
    fmt::print("{}: {}: {}\n", job_name(*g.op, how, g.info), status, reason);
    return static_cast<int>(status == "failed" || status == "error" ? ExitCode::check_failed
                                                                    : ExitCode::nothing_ran);
  }
  const auto started = std::chrono::steady_clock::now();
  DataHandle data = g.op->make(g.info.text, Fill::real, o.common.seed);
  const Runner runner = g.op->prepare(how, data);
  const double inputs_s =
      std::chrono::duration<double>(std::chrono::steady_clock::now() - started).count();
  if (!no_check) print_profilers(impl_name(*g.op, how), same, inputs_s, seconds);
  fmt::print("range {} ({}), pid {}\n", impl_name(*g.op, how), runner.resolved_isa, getpid());
  std::fflush(stdout);
  double total = 0;
  const int64_t runs = v3bench_profiled_range(runner, seconds, &total);
  fmt::print("{} runs, {} each\n", runs,
             rep::short_time_us(1e6 * total / static_cast<double>(runs)));
  return 0;
}

}  // namespace

void add_bench_commands(CLI::App& app, Chosen& chosen) {
  auto list = std::make_shared<JobOptions>();
  auto* sub = app.add_subcommand("list", "every op, implementation and case");
  add_selection(*sub, *list);
  sub->callback([list, &chosen] { chosen.run = [list] { return run_list(*list); }; });

  auto support = std::make_shared<JobOptions>();
  sub = app.add_subcommand("support", "what runs here, and why the rest does not");
  add_selection(*sub, *support);
  sub->add_flag("--csv", support->csv, "as CSV");
  sub->callback([support, &chosen] { chosen.run = [support] { return run_support(*support); }; });

  auto check = std::make_shared<JobOptions>();
  sub = app.add_subcommand("check", "every implementation against the reference");
  add_selection(*sub, *check);
  add_out(*sub, check->common, "");
  sub->callback(
      [check, &chosen] { chosen.run = [check] { return run_selected(*check, false, {}); }; });

  auto bench = std::make_shared<JobOptions>();
  bench->selection.check_only_cases = false;
  sub = app.add_subcommand("bench", "check, then time what passed; takes every --benchmark_* flag");
  add_selection(*sub, *bench);
  add_out(*sub, bench->common, "");
  sub->add_option("--min-time", bench->min_time, "seconds of samples a job")
      ->check(number_from(1e-6, 1e4));
  sub->add_option("--rounds", bench->rounds, "rounds in which implementations take turns")
      ->check(CLI::Range(1, 1000));
  sub->add_flag(
      "--unchecked", bench->unchecked,
      "no reference: rows of status unchecked, for whoever judges otherwise (scripts/peers)");
  sub->callback([bench, &chosen] {
    chosen.run = [bench, &chosen] { return run_selected(*bench, true, chosen.benchmark_args); };
  });

  auto profile = std::make_shared<JobOptions>();
  auto seconds = std::make_shared<double>(0.0);
  sub = app.add_subcommand("profile", "one job, checked, then run for a profiler");
  add_selection(*sub, *profile);
  sub->add_option("--seconds", *seconds, "run at least so long (default: once)")
      ->check(number_from(0, 1e6));
  auto no_check = std::make_shared<bool>(false);
  sub->add_flag("--no-check", *no_check, "only the run itself, for the profilers' command lines");
  sub->callback([profile, seconds, no_check, &chosen] {
    chosen.run = [=] { return run_profile(*profile, *seconds, *no_check); };
  });
}

int run_all_jobs(const Common& common, const std::vector<std::string>& benchmark_args) {
  JobOptions o;
  o.common = common;
  o.selection.device = common.device;
  o.min_time = common.quick ? 0.1 : 0.2;
  o.brief = true;
  return run_selected(o, true, benchmark_args);
}

}  // namespace v3b::cli
