// info, compare, table.
#include <fmt/format.h>

#include <dnnl.hpp>
#include <filesystem>

#include "bench/harness/nvml.h"
#include "bench/harness/peaks.h"
#include "bench/main/commands.h"
#include "kernels/core/cpu.h"
#include "reports/compare.h"
#include "reports/machine.h"
#include "reports/table.h"

namespace v3b::cli {
namespace {

int run_info(const Common& common, bool no_peaks) {
  prepare_run(common);
  bench::describe_gpu();
  const rep::MachineCard& m = rep::machine_card();
  const rep::Identity id = rep::identity("cpu");
  const auto& f = kern::cpu_features();
  std::vector<std::vector<std::string>> rows = {
      {"machine", m.id},
      {"processor", m.cpu_model + " (" + m.microarch + ")"},
      {"cores", fmt::format("{} sockets, {} cores, {} logical, {} usable, {} threads used",
                            m.sockets, m.cores, m.logical, m.usable, kern::num_threads())},
      {"caches",
       fmt::format("L1d {}, L2 {}, L3 {}", rep::short_bytes(double(m.l1d_bytes)),
                   rep::short_bytes(double(m.l2_bytes)), rep::short_bytes(double(m.l3_bytes)))},
      {"memory", rep::short_bytes(static_cast<double>(m.memory_bytes))},
      {"kernels may use",
       fmt::format("avx2{}{}{}{}{}", f.avx512 ? " avx512" : "", f.avx512_bf16 ? " avx512_bf16" : "",
                   f.avx512_vnni ? " avx512_vnni" : "",
                   f.amx_emulated ? " amx_bf16 (emulated: checks only)"
                   : f.amx_bf16   ? " amx_bf16"
                                  : "",
                   f.amx_int8 ? " amx_int8" : "")},
      {"hypervisor", m.hypervisor},
      {"governor", m.governor.empty() ? "not visible" : m.governor},
      {"system", m.os + ", " + m.kernel},
      {"huge pages", m.huge_pages},
      {"compiler", m.compiler + ", " + m.build_type + ", " + m.flags},
      {"commit",
       id.commit.empty() ? "not in git" : id.commit + (id.dirty ? " and uncommitted changes" : "")},
  };
  for (const auto& [name, version] : m.libraries) rows.push_back({name, version});
  for (const auto& [name, value] : m.gpu) rows.push_back({"gpu " + name, value});
  if (m.gpu.empty()) rows.push_back({"gpu", "none used by this build"});
  if (!no_peaks)
    for (const auto& [name, value] : bench::probe_all_peaks()) {
      const std::string kind = name.substr(0, name.find('_', name.rfind("gpu_", 0) == 0 ? 4 : 0));
      const std::string how = bench::roof_instruction(kind);
      rows.push_back(
          {"peak " + name, rep::short_number(value) + (how.empty() ? "" : " (" + how + ")")});
    }
  fmt::print("{}", rep::markdown_table({"what", "this machine"}, rows));
  return 0;
}

int run_compare(const std::string& base, const std::string& now, const rep::CompareOptions& options,
                bool all) {
  const rep::Comparison c = rep::compare_files(base, now, options);
  for (const auto& w : c.warnings) fmt::print(stderr, "v3bench: {}\n", w);
  fmt::print("{}", rep::comparison_table(c, all));
  return static_cast<int>(c.code);
}

}  // namespace

void add_report_commands(CLI::App& app, Chosen& chosen) {
  auto& libraries = rep::machine_card().libraries;
  const dnnl_version_t* v = dnnl_version();
  libraries["onednn"] = fmt::format("{}.{}.{}", v->major, v->minor, v->patch);

  auto common = std::make_shared<Common>();
  auto no_peaks = std::make_shared<bool>(false);
  auto* sub = app.add_subcommand("info", "what this machine is and can do");
  add_threads_seed(*sub, *common);
  sub->add_flag("--no-peaks", *no_peaks, "measure nothing");
  sub->callback([=, &chosen] { chosen.run = [=] { return run_info(*common, *no_peaks); }; });

  struct Paths {
    std::string base, now, dir;
    rep::CompareOptions options;
    bool all = false, peers = false;
  };
  auto p = std::make_shared<Paths>();
  sub = app.add_subcommand("compare",
                           "two bench.csv (or folders): regressions, improvements, missing cases");
  sub->add_option("BASE", p->base, "before")->required();
  sub->add_option("NEW", p->now, "after")->required();
  sub->add_option("--threshold", p->options.threshold_pct,
                  "percent of the median that count as no change")
      ->check(number_from(0, 1e6));
  sub->add_flag("--fail-on-ambiguous", p->options.fail_on_ambiguous,
                "exit code 3 for changes within the noise");
  sub->add_flag("--allow-different-machines", p->options.allow_different_machines);
  sub->add_flag("--all", p->all, "show unchanged rows too");
  sub->callback([=, &chosen] {
    chosen.run = [=] { return run_compare(p->base, p->now, p->options, p->all); };
  });

  sub = app.add_subcommand("table", "Markdown tables from the CSV files of a folder");
  sub->add_option("DIR", p->dir, "a folder of results, or one CSV file")->required();
  sub->add_flag("--peers", p->peers,
                "only ours against the fastest peer, case by case (bench.csv)");
  sub->callback([=, &chosen] {
    chosen.run = [=] {
      if (p->peers) {
        fmt::print("{}",
                   rep::render_peers(p->dir.ends_with(".csv") ? p->dir : p->dir + "/bench.csv"));
        return 0;
      }
      const bool file = p->dir.ends_with(".csv") || std::filesystem::is_regular_file(p->dir);
      fmt::print("{}", file ? rep::render_table(p->dir) : rep::render_all_tables(p->dir));
      return 0;
    };
  });
}

}  // namespace v3b::cli
