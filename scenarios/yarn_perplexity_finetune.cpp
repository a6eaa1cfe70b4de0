// Fine-tuning at longer contexts in phases, each from the weights of the one before, as V3 did
// (SPEC 4 no. 34: 4K -> 32K -> 128K, the same YaRN factor in both phases, a constant number of
// tokens a step, the learning rate that pre-training ended with).
#include <fmt/format.h>

#include <algorithm>
#include <csignal>
#include <filesystem>
#include <fstream>

#include "model/error.h"
#include "scenarios/training.h"
#include "scenarios/yarn_perplexity.h"

namespace v3b::scen {

namespace fs = std::filesystem;

namespace {
std::string read_line(const std::string& path) {
  std::ifstream in(path);
  std::string line;
  std::getline(in, line);
  return line;
}
}  // namespace

void check_finetune_variant(const ContextVariant& v) {
  if (v.dynamic || v.flags.yarn_ramp != spec::YarnRamp::index)
    throw Error(ExitCode::usage, "training has no such rotations", "--finetune-variants",
                "a variant with one table and the index ramp", v.name);
}

std::string finetune_variant(const YarnOptions& o, const std::string& model_dir,
                             const ContextVariant& v, const std::string& out) {
  check_finetune_variant(v);
  std::string from = model_dir;
  for (size_t phase = 0; phase < o.finetune_contexts.size(); ++phase) {
    const int64_t context = o.finetune_contexts[phase];
    TrainOptions t;
    t.out_dir =
        fmt::format("{}/{}-x{}-{}steps-{}", out, v.name, v.scaling.factor, o.finetune, context);
    const std::string done = t.out_dir + "/export-latest";
    const std::string marker = t.out_dir + "/finished",
                      settings = fmt::format("tokens={};lr={};seed={};from={}", o.finetune_tokens,
                                             o.finetune_lr, o.seed, from);
    std::error_code ec;
    if (!(o.resume && read_line(marker) == settings)) {
      fs::remove(marker, ec);  // of an earlier run: what follows may be interrupted
      t.init_dir = from;
      t.rope_scaling = v.scaling;
      t.context = context;
      t.corpus_dir = corpus_dir(o);
      t.tokenizer = model_dir + "/tokenizer.model";
      t.steps = o.finetune;
      t.batch = std::max<int64_t>(1, o.finetune_tokens / context);
      t.lr = o.finetune_lr;
      t.min_lr_ratio = 1;
      t.warmup_steps = 1;
      t.mtp_lambda = t.mtp_lambda_late = 0.1;
      t.seed = o.seed + phase;
      t.min_document_tokens = context + 1;
      t.validate_every = o.finetune + 1;
      t.log_every = 1;
      t.final_validate_tokens = context;  // the scenario measures held-out text itself
      t.resume = o.resume && fs::exists(t.out_dir + "/state.json", ec);
      fmt::print(stderr, "fine-tuning {} x{}, phase {}: {} steps of {} x {} tokens\n", v.name,
                 v.scaling.factor, phase + 1, t.steps, t.batch, context);
      const TrainResult tuned = train(t);
      if (tuned.interrupted) {
        std::raise(
            tuned.signal);  // training had taken the signal; the command's own handling goes on
        throw Error(ExitCode::nothing_ran, "fine-tuning was interrupted", t.out_dir,
                    "--resume to go on");
      }
      std::ofstream(marker) << settings << "\n";
    }
    from = done;
  }
  return from;
}

}  // namespace v3b::scen
