// Training of V3-shaped models on the CPU: data order, schedule, balance strategy, checkpoints,
// progress, the run's CSV and export to the Hugging Face layout. The arithmetic is kernels/train.
#pragma once
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "model/config.h"
#include "model/corpus.h"
#include "model/weights.h"

namespace v3b::kern::train {
class TrainStep;
}

namespace v3b::scen {

enum class Balance { none, switch_loss, sequence, bias, bias_sequence };
// "none", "switch", "sequence", "bias", "bias+sequence"; throws v3b::Error (usage).
Balance parse_balance(const std::string& name);
const char* balance_name(Balance b);

struct TrainRow {  // one line of train.csv; means over the steps since the row before
  int64_t step = 0, tokens = 0;
  double seconds = 0;                  // training time since the start, resumed parts included
  double loss = 0, mtp_loss = 0;       // nats a token
  double bits_per_byte = 0;            // of the training text
  double val_loss = -1, val_bpb = -1;  // negative: not measured in this row (blank in the CSV)
  double lr = 0, grad_norm = 0;
  double maxvio_batch_mean = 0;  // over MoE layers and steps (SPEC 1.19)
  double maxvio_max = 0;         // worst layer and step
  double tokens_per_s = 0;
  double aux_loss = 0;
  double val_mtp_loss = -1,
         val_mtp_agree = -1;  // share of MTP's top-1 equal to the model's own top-1
};

struct TrainOptions {
  std::string model = "tiny-v3";  // preset, config.json or checkpoint folder (its config only)
  std::string init_dir;           // start from these weights (fine-tuning); config from there too
  std::optional<model::RopeScaling> rope_scaling;  // replaces the config's
  int64_t context = 0;  // tokens a sequence; 0: the config's max_position_embeddings
  std::string corpus_dir = "build/corpus", tokenizer;  // "": tokenizer.model of model_dir()/tiny-v3
  std::string out_dir;  // train.csv, state-*.safetensors, state.json, export-latest/;
                        // "": nothing is written
  int64_t steps = 0;    // end by steps, or
  double minutes = 0;   // by time: the schedule's progress is then elapsed/limit
  int64_t batch = 8;
  double lr = 2e-3, min_lr_ratio = 0.1;
  int64_t warmup_steps = 100;
  double weight_decay = 0.1, clip = 1.0;           // clip 0: never
  double mtp_lambda = 0.3, mtp_lambda_late = 0.1;  // late: after 10/14.8 of the run, as V3 did
  Balance balance = Balance::bias_sequence;
  double aux_alpha = -1;     // -1: 1e-4 (sequence), 1e-2 (switch)
  double bias_speed = 1e-3;  // 0 in the last 0.5/14.8 of the run, as V3 did
  uint64_t seed = 1;
  int64_t min_document_tokens = 0;  // leave shorter documents out (long-context fine-tuning)
  // validate_every 0: never
  int64_t log_every = 10, validate_every = 250, validate_tokens = 32768;
  int64_t final_validate_tokens = 0;  // of the validation at the end; 0: the whole split
  double checkpoint_minutes = 5, export_minutes = 10;
  bool resume = false, exact = false;  // exact: float32 GEMMs
  bool quiet = false;                  // no progress on stderr
  std::function<void(const TrainRow&)> on_row;
};

struct EvalResult {
  int64_t tokens = 0, bytes = 0;
  double nats = 0, mtp_nats = 0;
  int64_t mtp_tokens = 0, mtp_agree = 0, mtp_compared = 0;
  double loss() const { return nats / static_cast<double>(tokens); }
  double bits_per_byte() const {
    return nats / (0.69314718055994530942 * static_cast<double>(bytes));
  }
};
// Every document by itself, cut into chunks of `context` inputs; the first token of a document is
// predicted from its bos, each later chunk starts without context. max_tokens > 0: about that many
// tokens, evenly spread chunks.
EvalResult evaluate(kern::train::TrainStep& step, const model::TokenStream& stream,
                    const model::Tokenizer& tokenizer, int64_t context, int64_t max_tokens,
                    double mtp_lambda = 0.3,
                    const std::function<void(double share)>& on_progress = {});

// Share of the GEMM peak that a step is expected to reach: its products are narrower than the
// measured one (K = 48..512) and the rest (softmax, norms, gathers) runs at no GEMM rate at all.
inline constexpr double kPredictedShare = 0.5;

struct TrainResult {
  std::vector<TrainRow> rows;
  EvalResult validation;  // at the end, over all of the validation split
  bool interrupted = false;
  int signal = 0;                     // the one that interrupted it
  double flops_per_token = 0;         // by formula, forward and backward
  double gemm_gflops = 0;             // this machine's best large GEMM, measured before the run
  double predicted_tokens_per_s = 0;  // at kPredictedShare of it
  double tokens_per_s = 0;            // reached

  model::ModelConfig config;
  std::shared_ptr<kern::train::TrainStep> step;
};
// Throws v3b::Error: usage naming the flag of an option out of range (NaN included), and what
// loading, writing and resuming throw; check_failed when training diverges.
TrainResult train(const TrainOptions& o);
// train() with its closing lines on stdout; returns the exit code (DESIGN 4).
int run_train(const TrainOptions& o);

// All weights and selection biases of a checkpoint into the master weights. Throws bad_input when a
// parameter is missing.
void set_weights(kern::train::TrainStep& step, const model::ModelWeights& weights);

// Checkpoint folder in Hugging Face layout: config.json, model.safetensors (bf16, selection bias
// f32, MTP layer under id L without copies of embedding and head) and, if given, the tokenizer's
// files. Written beside its final name and renamed.
void export_checkpoint(const kern::train::TrainStep& step, const model::ModelConfig& config,
                       const std::vector<std::vector<float>>& bias, const std::string& dir,
                       const std::string& tokenizer_model);

}  // namespace v3b::scen
