// How evenly the experts are used, and what it costs when they are not (SPEC 1.12, 1.17-1.19): (a)
// a trained model on held-out text with the selection bias and the group limit on and off, (b)
// training with each balance strategy, (c) measured expert-layer time on synthetic routes, (d) the model with
// a capacity factor and token dropping (1.15). Writes expert_load.csv; columns in reports/README.md.
#pragma once
#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "scenarios/common.h"

namespace v3b::scen {

// Empty lists and zeros take the defaults of --quick or --full.
struct ExpertLoadOptions : CommonOptions {
  std::vector<std::string> parts;  // model, capacity, training, synthetic
  // (a)
  int64_t tokens = 0;         // held-out tokens a setting: 16384 quick, 131072 full
  int64_t window = 0;         // tokens a sequence: min(512, max_position_embeddings)
  int64_t batch_windows = 0;  // sequences of a batch, whose load is MaxVio_batch's: 4
  // (d)
  std::vector<double> capacity_factors;    // of SPEC 1.15; nothing dropped is always measured too
  std::vector<std::string> drop_policies;  // slot, token, prob
  int64_t capacity_tokens = 0;             // held-out tokens a setting: 4096 quick, 16384 full
  // (b)
  std::vector<std::string> strategies;  // none, switch, sequence, bias, bias+sequence
  std::string train_model;  // preset or config of the trained model; "" : a small one of our own
  int64_t train_steps = 0, train_batch = 0, train_context = 0;
  double bias_speed = 0;  // u of SPEC 1.18: 5e-3 quick, 1e-3 full
  // (c)
  std::vector<std::string>
      routes;                // uniform, zipf-S, hot-N (N experts take all), ratio-R (max/mean)
  int64_t route_tokens = 0;  // T; 0: 16 and 256 quick, 8, 64 and 512 full
  double route_seconds = 0;  // samples of one measured case: 0.15 quick, 0.5 full
};

// Throws v3b::Error. Returns an exit code of DESIGN 4: 1 when a measured kernel failed its check.
int run_expert_load(const ExpertLoadOptions& o);

// ---- parts, for tests
// -------------------------------------------------------------------------------------- Load of
// one layer in batches of equal T.
class LoadCounter {
 public:
  LoadCounter(int64_t experts, int64_t groups);
  void add(std::span<const int32_t> idx,
           int64_t K);  // routes of some tokens, [n, K]; goes into the open batch
  void end_batch();
  int64_t tokens() const { return tokens_; }
  int64_t batches() const { return batches_; }
  double maxvio_batch() const;  // mean over batches
  double maxvio_batch_max() const { return worst_; }
  double groups_per_token() const;
  const std::vector<int64_t>& load() const {
    return total_;
  }  // [E] over all batches, the open one too

 private:
  int64_t experts_, group_size_, tokens_ = 0, batches_ = 0, groups_ = 0;
  double sum_ = 0, worst_ = 0;
  std::vector<int64_t> open_, total_;
};

// Mean MaxVio of T tokens that each choose K of E experts at random, all sets equally likely: what
// perfect balance looks like at this T (SPEC 1.19). By simulation, deterministic in seed; draws
// shrink with T.
double maxvio_noise_floor(int64_t E, int64_t K, int64_t T, uint64_t seed = 1);

}  // namespace v3b::scen
