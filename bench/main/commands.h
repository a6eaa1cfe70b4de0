// The subcommands of v3bench. Each add_*() declares options and leaves in `run` what the chosen one
// does.
#pragma once
#include <CLI/CLI.hpp>
#include <functional>
#include <string>
#include <vector>

#include "reference/spec/flags.h"

namespace v3b::cli {

struct Chosen {
  std::function<int()> run;  // set by the callback of the subcommand on the command line
  std::vector<std::string> benchmark_args;  // --benchmark_*, taken out of argv before parsing
};

// Options that most subcommands share.
struct Common {
  int64_t threads = 0;
  uint64_t seed = 1;
  std::string out, device;
  bool quick = false, full = false, resume = false;
};
// Accepts lo <= number <= hi; CLI::Range lets NaN through.
CLI::Validator number_from(double lo, double hi);
void add_threads_seed(CLI::App& app, Common& c);
void add_sizes(CLI::App& app, Common& c);
void add_out(CLI::App& app, Common& c, const std::string& default_dir);

void add_bench_commands(CLI::App& app, Chosen& chosen);  // list support check bench profile
void add_closure_command(CLI::App& app, Chosen& chosen);
void add_export_command(CLI::App& app, Chosen& chosen);
void add_scenario_commands(CLI::App& app, Chosen& chosen);  // scenario all
void add_model_commands(CLI::App& app, Chosen& chosen);     // train logits generate
void add_report_commands(CLI::App& app, Chosen& chosen);    // info compare table

// --flags router_mask=zero,...: of the forward pass (reference/spec/flags.h).
void add_flags(CLI::App& app, spec::Flags& flags);

// For `all`: checks and times the ops' own cases into DIR/bench.csv; returns the exit code.
int run_all_jobs(const Common& common, const std::vector<std::string>& benchmark_args);

// Sets OpenMP's threads and remembers DIR for the line that an interruption prints.
void prepare_run(const Common& c);
void set_interrupt_note(const std::string& note);

}  // namespace v3b::cli
