// v3bench: parses the command line, runs one subcommand, turns errors into one line and an exit
// code (DESIGN 4).
#include <fmt/format.h>
#include <signal.h>
#include <unistd.h>

#include <cerrno>
#include <cstdio>
#include <cstring>
#include <filesystem>
#include <new>
#include <system_error>

#include "bench/harness/flags_text.h"
#include "bench/harness/running_marker.h"
#include "bench/main/commands.h"
#include "bench/main/usage.h"
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

int usage_error(const std::string& text, const std::string& command = "v3bench") {
  fmt::print(stderr, "v3bench: {} ({} --help)\n", one_line(text), command);
  return static_cast<int>(ExitCode::usage);
}

// The end of a run whose standard output may have failed. A reader that had enough (| head) is told nothing.
int output_lost(int error, int code) {
  if (error != EPIPE)
    std::fputs(("v3bench: standard output: cannot write" +
                (error != 0 ? std::string("; found ") + std::strerror(error) : "") + "\n")
                   .c_str(),
               stderr);
  return code != 0 ? code : static_cast<int>(ExitCode::cannot_write);
}

int finish(int code) {
  errno = 0;
  const bool flushed = std::fflush(stdout) == 0;
  return flushed && std::ferror(stdout) == 0 ? code : output_lost(errno, code);
}

int system_failure(const std::system_error& e) {
  if (std::ferror(stdout) != 0) return output_lost(e.code().value(), 0);
  std::fputs(("v3bench: " + one_line(e.what()) + "\n").c_str(), stderr);
  const bool written = e.code() == std::errc::no_space_on_device ||
                       e.code() == std::errc::file_too_large ||
                       e.code() == std::errc::read_only_file_system || e.code().value() == EDQUOT ||
                       std::ferror(stderr) != 0;
  return static_cast<int>(written ? ExitCode::cannot_write : ExitCode::check_failed);
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
  app.footer(
      "Examples:\n"
      "  v3bench list --op fp8_gemm\n"
      "  v3bench bench --op fp8_gemm --case m=96,n=4608,k=7168 --out results\n"
      "  v3bench scenario kv-cache --quick --out results\n"
      "  v3bench table results\n"
      "v3bench COMMAND --help tells a command's options.\n"
      "Exit codes: 0 all well; 1 a check failed; 2 regression; 3 ambiguous; 4 nothing matched or "
      "ran; 5 a case is "
      "missing;\n6 machines differ; 64 usage; 65 bad input; 66 not found; 74 cannot write; 130, "
      "143 interrupted.");
  app.set_version_flag("--version", "v3bench 0.1.0");
  add_bench_commands(app, chosen);
  add_closure_command(app, chosen);
  add_export_command(app, chosen);
  add_scenario_commands(app, chosen);
  add_model_commands(app, chosen);
  add_report_commands(app, chosen);
  const std::vector<std::string> words(args.rbegin(), args.rend());
  const std::string unknown = unknown_command(app, words);
  if (!unknown.empty()) return usage_error(unknown);
  const std::string command = command_of(app, words);
  try {
    app.parse(args);
  } catch (const CLI::Success& e) {  // --help, --version
    return app.exit(e);
  } catch (const CLI::ExtrasError& e) {
    const std::string option = unknown_option(app, words);
    return usage_error(option.empty() ? e.what() : option, command);
  } catch (const CLI::ParseError& e) {
    return usage_error(e.what(), command);
  }
  if (!chosen.run) return usage_error("no command given");
  // Times and scores of an emulation mean nothing.
  const std::string verb = command.substr(command.rfind(' ') + 1);
  if (kern::cpu_features().amx_emulated && verb != "check" && verb != "list" && verb != "support" &&
      verb != "info")
    return usage_error("V3BENCH_AMX=emulate is for check, list, support and info");
  return chosen.run();
}

}  // namespace

void set_interrupt_note(const std::string& note) {
  fmt::format_to_n(g_interrupt_note, sizeof g_interrupt_note - 1, "\nv3bench: interrupted; {}\n{}",
                   note, '\0');
}

void prepare_run(const Common& c) { kern::set_num_threads(static_cast<int>(c.threads)); }

CLI::Validator number_from(double lo, double hi) {
  const std::string range = fmt::format("FLOAT in [{} - {}]", lo, hi);
  return CLI::Validator(
      [=](std::string& text) {
        double v = 0;
        const bool good = CLI::detail::lexical_cast(text, v) && v >= lo && v <= hi;
        return good ? std::string()
                    : "Value " + text + " not in range [" + fmt::format("{} - {}", lo, hi) + "]";
      },
      range);
}

void add_threads_seed(CLI::App& app, Common& c) {
  app.add_option("--threads", c.threads, "threads (0: all that this process may use)")
      ->check(CLI::Range(0, 4096));
  app.add_option("--seed", c.seed, "seed of all inputs");
}
void add_flags(CLI::App& app, spec::Flags& flags) {
  app.add_option_function<std::string>(
      "--flags",
      [&flags](const std::string& text) { flags = bench::parse_forward_flags(text, "--flags"); },
      "compatibility flags, router_mask=zero,norm_rounding=hf,... (reference/spec/flags.h)");
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
    return cli::finish(cli::run_command(argc, argv));
  } catch (const Error& e) {
    std::fputs(("v3bench: " + std::string(e.what()) + "\n").c_str(), stderr);
    return static_cast<int>(e.code());
  } catch (const std::system_error& e) {  // fmt's own too, when standard output fails
    return cli::system_failure(e);
  } catch (const std::bad_alloc&) {
    std::fputs("v3bench: out of memory\n", stderr);
  } catch (const std::exception& e) {
    std::fputs(("v3bench: " + cli::one_line(e.what()) + "\n").c_str(), stderr);
  }
  return static_cast<int>(ExitCode::check_failed);
}

}  // namespace

int main(int argc, char** argv) {
  v3b::cli::install_signal_handlers();
  return leave(run(argc, argv));
}
