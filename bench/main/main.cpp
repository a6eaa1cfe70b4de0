// v3bench: parses the command line, runs one subcommand, turns errors into one line and an exit
// code (DESIGN 4).
#include <fmt/format.h>
#include <signal.h>
#include <unistd.h>

#include <cstdio>
#include <cstring>
#include <new>

#include "bench/harness/running_marker.h"
#include "bench/main/commands.h"
#include "kernels/core/cpu.h"
#include "kernels/core/cuda.h"
#include "model/error.h"

namespace v3b::cli {
namespace {

char g_interrupt_note[512] = "v3bench: interrupted\n";

// Rows are written whole and at once, so leaving on the spot loses nothing that was finished.
void on_signal(int signal) {
  bench::RunningMarker::remove_now();
  const ssize_t n = write(STDERR_FILENO, g_interrupt_note, std::strlen(g_interrupt_note));
  (void)n;
  _exit(128 + signal);
}

void install_signal_handlers() {
  struct sigaction action {};
  action.sa_handler = on_signal;
  sigaction(SIGINT, &action, nullptr);
  sigaction(SIGTERM, &action, nullptr);
  ::signal(SIGPIPE, SIG_IGN);
  ::signal(SIGXFSZ, SIG_IGN);  // a full quota is an error of write(), like a full disk
}

std::string one_line(std::string s) {
  for (char& c : s)
    if (c == '\n' || c == '\r') c = ' ';
  while (!s.empty() && s.back() == ' ') s.pop_back();
  return s;
}

int usage_error(const std::string& text) {
  fmt::print(stderr, "v3bench: {} (v3bench --help)\n", one_line(text));
  return static_cast<int>(ExitCode::usage);
}

// CLI11 would only say that a subcommand is missing.
std::string unknown_command(const CLI::App& app, const std::vector<std::string>& words) {
  const CLI::App* level = &app;
  for (const auto& w : words) {
    if (w.empty() || w[0] == '-') return "";
    std::string names;
    const CLI::App* next = nullptr;
    for (const CLI::App* sub : level->get_subcommands([](const CLI::App*) { return true; })) {
      names += (names.empty() ? "" : " ") + sub->get_name();
      if (sub->get_name() == w) next = sub;
    }
    if (names.empty()) return "";
    if (next == nullptr) return "unknown command '" + w + "'; expected one of: " + names;
    level = next;
  }
  return "";
}

int run_command(int argc, char** argv) {
  Chosen chosen;
  std::vector<std::string> args;  // CLI11 takes them last first
  for (int i = argc - 1; i > 0; --i) {
    const std::string a = argv[i];
    if (a.rfind("--benchmark_", 0) == 0)
      chosen.benchmark_args.insert(chosen.benchmark_args.begin(), a);
    else
      args.push_back(a);
  }
  CLI::App app{"Benchmarks and checks of DeepSeek-V3 components on this machine", "v3bench"};
  app.require_subcommand(1);
  app.set_version_flag("--version", "v3bench 0.1.0");
  add_bench_commands(app, chosen);
  add_scenario_commands(app, chosen);
  add_model_commands(app, chosen);
  add_report_commands(app, chosen);
  const std::string unknown = unknown_command(app, {args.rbegin(), args.rend()});
  if (!unknown.empty()) return usage_error(unknown);
  try {
    app.parse(args);
  } catch (const CLI::Success& e) {  // --help, --version
    return app.exit(e);
  } catch (const CLI::ParseError& e) {
    return usage_error(e.what());
  }
  return chosen.run ? chosen.run() : usage_error("no command given");
}

}  // namespace

void set_interrupt_note(const std::string& note) {
  fmt::format_to_n(g_interrupt_note, sizeof g_interrupt_note - 1, "\nv3bench: interrupted; {}\n{}",
                   note, '\0');
}

void prepare_run(const Common& c) { kern::set_num_threads(static_cast<int>(c.threads)); }

void add_threads_seed(CLI::App& app, Common& c) {
  app.add_option("--threads", c.threads, "threads (0: all that this process may use)")
      ->check(CLI::Range(0, 4096));
  app.add_option("--seed", c.seed, "seed of all inputs");
}
void add_sizes(CLI::App& app, Common& c) {
  auto* quick = app.add_flag("--quick", c.quick, "the small subset");
  app.add_flag("--full", c.full, "everything")->excludes(quick);
}
void add_out(CLI::App& app, Common& c, const std::string& default_dir) {
  c.out = default_dir;
  app.add_option("--out", c.out,
                 "folder for CSV files" + (default_dir.empty() ? "" : ", default " + default_dir));
  app.add_flag("--resume", c.resume, "keep the finished rows there and do the rest");
}

}  // namespace v3b::cli

namespace {

// After a CUDA fault, destructors of driver and runtime may wait for a kernel that never ends.
int leave(int code) {
  if (!v3b::kern::cuda_lost()) return code;
  std::fflush(nullptr);
  _exit(code);
}

int run(int argc, char** argv) {
  using namespace v3b;
  try {
    return cli::run_command(argc, argv);
  } catch (const Error& e) {
    fmt::print(stderr, "v3bench: {}\n", e.what());
    return static_cast<int>(e.code());
  } catch (const std::bad_alloc&) {
    fmt::print(stderr, "v3bench: out of memory\n");
  } catch (const std::exception& e) {
    fmt::print(stderr, "v3bench: {}\n", cli::one_line(e.what()));
  }
  return static_cast<int>(ExitCode::check_failed);
}

}  // namespace

int main(int argc, char** argv) {
  v3b::cli::install_signal_handlers();
  return leave(run(argc, argv));
}
