// Part (b): the same small model trained from the same seed with each balance strategy; MaxVio and
// loss over steps.
#include <fmt/format.h>

#include <algorithm>
#include <csignal>
#include <cstdio>
#include <filesystem>
#include <fstream>

#include "bench/harness/flags_text.h"
#include "model/corpus.h"
#include "model/error.h"
#include "model/tokenizer.h"
#include "scenarios/device.h"
#include "scenarios/expert_load_rows.h"
#include "scenarios/training.h"

namespace v3b::scen {
namespace {

constexpr int64_t kQuickSamples = 8;  // rows a strategy
constexpr int64_t kFullSamples = 40;
constexpr int64_t kValidations = 4;

// Sixteen experts in four groups, as small as training dynamics allow: the preset `train`, narrower
// for --quick.
model::ModelConfig small_config(bool full, int64_t vocab, int64_t context) {
  model::ModelConfig c = model::load_preset("train");
  c.vocab_size = vocab;
  c.max_position_embeddings = context;
  c.num_nextn_predict_layers = 0;
  if (full) return c;
  c.num_hidden_layers = 3;
  c.hidden_size = 64;
  c.intermediate_size = 192;
  c.moe_intermediate_size = 48;
  return c;
}

// The configuration as a file, which training reads; it stays beside the results.
std::string write_config(const ExpertLoadOptions& o, const model::ModelConfig& c) {
  const std::string path = o.out + "/expert_load_train_config.json";
  std::ofstream out(path);
  out << model::config_to_json(c);
  out.close();
  if (!out) throw Error(ExitCode::cannot_write, "cannot write", path);
  return path;
}

}  // namespace

void expert_load_training(const ExpertLoadOptions& o, rep::CsvWriter& csv) {
  for (const auto& s : o.strategies) (void)parse_balance(s);
  const std::string flags = bench::changed_flags_text(o.flags);
  if (!flags.empty() || on_cuda(o)) {
    for (const auto& s : o.strategies) {
      rep::Record r;
      r.set("part", "training").set("tokens_from", "train").set("strategy", s).set("layer", "all");
      r.set("status", "unsupported");
      r.set("reason", on_cuda(o) ? "training runs on the CPU only"
                                 : "training's forward pass takes no flags");
      if (!csv.has(r)) write_row(o, csv, r);
    }
    return;
  }
  const std::string tokenizer = model::model_dir() + "/tiny-v3/tokenizer.model";
  TrainOptions t;
  model::ModelConfig c;
  std::string name = o.train_model;
  if (name.empty()) {
    c = small_config(o.full, model::Tokenizer::load(tokenizer).vocab_size(), o.train_context);
    t.model = write_config(o, c);
    name = fmt::format("train, d {}, {} layers, vocabulary {}", c.hidden_size, c.num_hidden_layers,
                       c.vocab_size);
  } else {
    t.model = name;
    c = std::filesystem::exists(name) ? model::load_config(name) : model::load_preset(name);
  }
  if (!o.text.empty())
    throw Error(ExitCode::usage, "training needs the corpus", "--text",
                "--corpus DIR, or --parts model,synthetic", o.text);
  t.corpus_dir = corpus_dir(o);
  t.tokenizer = tokenizer;
  t.context = o.train_context;
  t.steps = o.train_steps;
  t.batch = o.train_batch;
  t.seed = o.seed;
  t.warmup_steps = std::max<int64_t>(1, o.train_steps / 10);
  t.bias_speed = o.bias_speed;
  t.log_every = std::max<int64_t>(1, o.train_steps / (o.full ? kFullSamples : kQuickSamples));
  t.validate_every = std::max<int64_t>(1, o.train_steps / kValidations);
  t.validate_tokens = t.final_validate_tokens = o.full ? 32768 : 4096;
  t.quiet = true;
  const int64_t T = o.train_batch * o.train_context;
  const double floor = maxvio_noise_floor(c.n_routed_experts, c.num_experts_per_tok, T, o.seed);

  Progress progress("expert-load training",
                    static_cast<double>(o.train_steps) * static_cast<double>(o.strategies.size()));
  for (const auto& strategy : o.strategies) {
    progress.show(strategy);
    const auto row = [&](int64_t step) {
      rep::Record r;
      r.set("part", "training")
          .set("model", name)
          .set("tokens_from", "train")
          .set("strategy", strategy);
      r.set("layer", "all").set("step", step).set("tokens", step * T);
      return r;
    };
    if (csv.has(row(o.train_steps))) {
      progress.advance(static_cast<double>(o.train_steps));
      continue;
    }
    t.balance = parse_balance(strategy);
    const auto write = [&](const TrainRow& x, double val_loss, double val_bpb) {
      rep::Record r = row(x.step);
      if (csv.has(r)) return;
      r.set("experts", c.n_routed_experts).set("top_k", c.num_experts_per_tok);
      r.set("groups", c.n_group).set("groups_kept", c.topk_group).set("batch_tokens", T);
      r.set("maxvio_batch", x.maxvio_batch_mean).set("maxvio_batch_max", x.maxvio_max);
      r.set("noise_floor_batch", floor).set("train_loss", x.loss).set("aux_loss", x.aux_loss);
      if (val_loss >= 0) r.set("val_loss", val_loss).set("val_bits_per_byte", val_bpb);
      if (t.balance == Balance::bias || t.balance == Balance::bias_sequence)
        r.set("bias_speed", o.bias_speed);
      r.set("tokens_per_s", x.tokens_per_s).set("status", "ok");
      write_row(o, csv, r);
    };
    int64_t seen = 0;
    t.on_row = [&](const TrainRow& x) {  // the last row waits for the last validation
      if (x.step < o.train_steps) write(x, x.val_loss, x.val_bpb);
      progress.advance(static_cast<double>(x.step - seen));
      progress.show(
          fmt::format("{}, step {}, MaxVio {:.3f}", strategy, x.step, x.maxvio_batch_mean));
      seen = x.step;
    };
    const TrainResult result = train(t);
    if (result.interrupted) {
      std::raise(
          result.signal);  // training had taken the signal; the caller's own handling goes on
      return;
    }
    write(result.rows.back(), result.validation.loss(), result.validation.bits_per_byte());
  }
  progress.finish();
}

}  // namespace v3b::scen
