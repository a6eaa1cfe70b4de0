// closure: the components of a forward pass beside the pass itself.
#include <fmt/format.h>

#include "bench/harness/check.h"
#include "bench/harness/jobs.h"
#include "bench/main/commands.h"
#include "bench/ops/closure.h"
#include "bench/ops/registry.h"
#include "model/error.h"
#include "reports/machine.h"
#include "reports/table.h"

namespace v3b::cli {
namespace {

using namespace bench;

const std::vector<std::string>& closure_columns() {
  static const std::vector<std::string> columns =
      rep::with_identity({"op", "case", "params", "dtype", "status", "reason", "component", "shape",
                          "calls", "median_us", "total_us", "share_pct", "in_pass_us"});
  return columns;
}

struct ClosureArgs {
  Common common;
  Selection selection;
  ClosureOptions options;
};

const char* between_name(Between b) {
  return b == Between::nothing ? "nothing" : b == Between::pass ? "pass" : "all";
}

void write_case(const JobGroup& g, const ClosureArgs& a, const CheckResult& check, const Closure* c,
                rep::CsvWriter* out) {
  if (out == nullptr) return;
  rep::Record base;
  base.set(rep::identity("cpu"));
  base.set("op", g.op->name()).set("case", g.info.text).set("dtype", g.info.dtype);
  base.set("status", check.status).set("reason", check.reason);
  base.set("params",
           fmt::format("seed={};threads={};rounds={};repetitions={};between={}", a.common.seed,
                       kern::num_threads(), a.options.rounds, a.options.repetitions,
                       c != nullptr ? between_name(c->between) : ""));
  if (c == nullptr) {
    out->write(base);
    return;
  }
  const auto row = [&](const std::string& component, const std::string& shape,
                       std::optional<int64_t> calls, std::optional<double> median, double total,
                       std::optional<double> in_pass) {
    rep::Record r = base;
    r.set("component", component).set("shape", shape).set("calls", calls).set("median_us", median);
    r.set("total_us", total).set("share_pct", 100 * total / c->pass_us);
    r.set("in_pass_us", in_pass);
    out->write(r);
  };
  row("pass", "", 1, c->pass_us, c->pass_us, c->pass_us);
  for (const auto& p : c->components)
    row(p.component, p.shape, p.calls, p.median_us, p.total_us, p.in_pass_us);
  row("unexplained", "", std::nullopt, std::nullopt, c->rest_us(), c->pass_us - c->in_pass_us());
}

int run_closure(ClosureArgs& a) {
  prepare_run(a.common);
  const Ops ops = all_ops();
  a.selection.size = a.common.full ? Size::full : a.common.quick ? Size::quick : Size::standard;
  a.selection.check_only_cases = false;
  a.selection.impls = {"cpu_backend"};
  if (a.selection.ops.empty()) a.selection.ops = {"forward_prefill", "forward_decode"};
  for (const auto& op : a.selection.ops)
    if (op != "forward_prefill" && op != "forward_decode" && op != "mtp_module")
      throw Error(ExitCode::usage, "no forward pass", "--op",
                  "forward_prefill, forward_decode or mtp_module", "'" + op + "'");
  const auto groups = select_jobs(ops, a.selection);
  if (groups.empty())
    throw Error(ExitCode::nothing_ran, "no case matches", "v3bench list shows all");
  std::unique_ptr<rep::CsvWriter> out;
  if (!a.common.out.empty()) {
    rep::ensure_output_dir(a.common.out);
    out = std::make_unique<rep::CsvWriter>(a.common.out + "/closure.csv", closure_columns());
    rep::write_machine_json(a.common.out);
  }
  a.options.seed = a.common.seed;
  bool failed = false;
  int64_t measured = 0;
  for (const JobGroup& g : groups) {
    // No time of a job that did not pass in this process (law 6).
    const CheckResult check = CaseChecker(*g.op, g.info, a.common.seed).check("cpu_backend");
    if (check.status != "passed") {
      write_case(g, a, check, nullptr, out.get());
      fmt::print("{}/{}: {}: {}\n", g.op->name(), g.info.text, check.status, check.reason);
      failed = failed || check.status == "failed" || check.status == "error";
      continue;
    }
    const ForwardWhat what = g.op->name() == "forward_decode" ? ForwardWhat::decode
                             : g.op->name() == "mtp_module"   ? ForwardWhat::mtp
                                                              : ForwardWhat::prefill;
    const Closure c = measure_closure(
        shape_from_text<spec::ForwardShape>(g.info.text, g.op->name()), what, a.options);
    write_case(g, a, check, &c, out.get());
    ++measured;
    std::vector<std::vector<std::string>> lines;
    const auto line = [&](const std::string& what_runs, const std::string& shape,
                          const std::string& calls, const std::string& each, double total,
                          double in_pass) {
      lines.push_back({what_runs, shape, calls, each, rep::short_time_us(total),
                       rep::short_number(100 * total / c.pass_us, 3) + "%",
                       rep::short_time_us(in_pass)});
    };
    for (const auto& p : c.components)
      line(p.component, p.shape, std::to_string(p.calls), rep::short_time_us(p.median_us),
           p.total_us, p.in_pass_us);
    line("unexplained", "", "", "", c.rest_us(), c.pass_us - c.in_pass_us());
    line("pass", "", "1", rep::short_time_us(c.pass_us), c.pass_us, c.pass_us);
    using enum rep::Align;
    fmt::print("**{}** {}\n\n{}\n", g.op->name(), g.info.text,
               rep::markdown_table({"component", "shape", "calls", "alone", "together",
                                    "of the pass", "in the pass"},
                                   lines, {left, left, right, right, right, right, right}));
  }
  if (failed) return static_cast<int>(ExitCode::check_failed);
  return static_cast<int>(measured > 0 ? ExitCode::ok : ExitCode::nothing_ran);
}

}  // namespace

void add_closure_command(CLI::App& app, Chosen& chosen) {
  auto a = std::make_shared<ClosureArgs>();
  auto* sub = app.add_subcommand(
      "closure", "components of a forward pass, each alone times its calls, beside the pass");
  sub->add_option("--op", a->selection.ops, "forward_prefill, forward_decode, mtp_module")
      ->delimiter(',');
  sub->add_option("--case", a->selection.cases, "a case of any shape of one --op; may be repeated");
  sub->add_option("--filter", a->selection.filter,
                  "regular expression searched in op.cpu_backend/case");
  sub->add_option("--rounds", a->options.rounds, "rounds of whole passes and pieces")
      ->check(CLI::Range(1, 1000));
  sub->add_option("--repetitions", a->options.repetitions, "of each piece in a round")
      ->check(CLI::Range(1, 1000));
  sub->add_option("--min-time", a->options.seconds, "seconds of whole passes")
      ->check(number_from(1e-6, 1e4));
  add_sizes(*sub, a->common);
  add_threads_seed(*sub, a->common);
  sub->add_option("--out", a->common.out, "folder for closure.csv");
  sub->callback([a, &chosen] { chosen.run = [a] { return run_closure(*a); }; });
}

}  // namespace v3b::cli
