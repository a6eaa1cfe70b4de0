// export: the model of a forward case as a checkpoint, for whoever else is to run it (scripts/peers).
#include <fmt/format.h>

#include <filesystem>
#include <fstream>

#include "bench/harness/jobs.h"
#include "bench/harness/shape_io.h"
#include "bench/main/commands.h"
#include "bench/ops/forward_common.h"
#include "model/error.h"
#include "model/save_weights.h"
#include "reports/machine.h"

namespace v3b::cli {
namespace {

struct ExportArgs {
  Common common;
  std::string op = "forward_decode", shape;
};

int run_export(const ExportArgs& a) {
  prepare_run(a.common);
  if (a.op != "forward_decode" && a.op != "forward_prefill")
    throw Error(ExitCode::usage, "no model to export", "--op", "forward_decode or forward_prefill",
                "'" + a.op + "'");
  const auto s = bench::shape_from_text<spec::ForwardShape>(a.shape, a.op);
  bench::validate_forward(
      s, a.op == "forward_decode" ? bench::ForwardWhat::decode : bench::ForwardWhat::prefill,
      "--case");
  if (s.w_dtype != spec::DType::bf16)
    throw Error(ExitCode::usage, "only bf16 matrices are exported", "--case", "w_dtype=bf16",
                spec::dtype_name(s.w_dtype));
  const model::WeightsPtr w = bench::forward_weights(s, false);
  rep::ensure_output_dir(a.common.out);
  model::save_weights(a.common.out + "/model.safetensors", *w);
  const std::string config = a.common.out + "/config.json";
  std::ofstream out(config, std::ios::binary);
  out << model::config_to_json(w->config);
  out.close();
  if (!out) throw Error(ExitCode::cannot_write, "cannot write", config);
  std::error_code ec;
  const auto bytes = std::filesystem::file_size(a.common.out + "/model.safetensors", ec);
  fmt::print("{}: {} layers, {:.2f} GB\n", a.common.out, w->config.num_hidden_layers,
             static_cast<double>(bytes) * 1e-9);
  return 0;
}

}  // namespace

void add_export_command(CLI::App& app, Chosen& chosen) {
  auto a = std::make_shared<ExportArgs>();
  auto* sub = app.add_subcommand(
      "export", "the model of a forward case as a checkpoint (config.json, model.safetensors)");
  sub->add_option("--op", a->op, "forward_decode or forward_prefill");
  sub->add_option("--case", a->shape, "the case, as in bench --case")->required();
  sub->add_option("--out", a->common.out, "folder to write")->required();
  sub->add_option("--threads", a->common.threads, "threads (0: all)")->check(CLI::Range(0, 4096));
  sub->callback([a, &chosen] {
    chosen.run = [a] {
      set_interrupt_note("nothing was written");
      return run_export(*a);
    };
  });
}

}  // namespace v3b::cli
