// scenario, all. A scenario is one entry of the list below: its options struct and run function
// come from scenarios/<name>.h.
#include <fmt/format.h>

#include "bench/main/commands.h"
#include "model/error.h"
#include "reports/machine.h"
#include "reports/table.h"

namespace v3b::cli {
namespace {

// Declares the scenario's own options under `scenario NAME`; `all` runs them with defaults.
struct ScenarioEntry {
  const char* name;
  void (*add)(CLI::App& scenario, Chosen& chosen);
  int (*run_default)(const Common& common);
};

const std::vector<ScenarioEntry>& scenario_entries() {
  static const std::vector<ScenarioEntry> entries = {};
  return entries;
}

int run_all(const Common& common, const std::vector<std::string>& benchmark_args) {
  rep::ensure_output_dir(common.out);
  int worst = run_all_jobs(common, benchmark_args);
  for (const auto& s : scenario_entries()) {
    fmt::print(stderr, "scenario {}\n", s.name);
    int code = 0;
    try {
      code = s.run_default(common);
    } catch (const Error& e) {  // the others still run
      fmt::print(stderr, "v3bench: scenario {}: {}\n", s.name, e.what());
      code = static_cast<int>(e.code());
    }
    if (worst == 0) worst = code;
  }
  rep::write_machine_json(common.out);
  fmt::print("\n{}", rep::render_all_tables(common.out));
  return worst;
}

}  // namespace

void add_scenario_commands(CLI::App& app, Chosen& chosen) {
  auto* scenario = app.add_subcommand("scenario", "one question answered with a table and a CSV");
  scenario->require_subcommand(1);
  for (const auto& s : scenario_entries()) s.add(*scenario, chosen);

  auto common = std::make_shared<Common>();
  auto* all = app.add_subcommand("all", "check, bench and every scenario into one folder");
  add_sizes(*all, *common);
  add_threads_seed(*all, *common);
  add_out(*all, *common, "results");
  all->add_option("--device", common->device, "cpu or cuda")->check(CLI::IsMember({"cpu", "cuda"}));
  all->callback([common, &chosen] {
    chosen.run = [common, &chosen] { return run_all(*common, chosen.benchmark_args); };
  });
}

}  // namespace v3b::cli
