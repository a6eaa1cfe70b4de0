// What a model that was trained on L tokens loses beyond them, with each context extension of RoPE
// (SPEC 1.4), before and after a short fine-tune at the longer length. Losses by position, paired
// differences with a bootstrap interval over documents, sliding windows in both definitions
// (SPEC 1.29). Writes yarn_perplexity.csv; columns in reports/README.md.
#pragma once
#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "reference/spec/flags.h"
#include "scenarios/common.h"

namespace v3b::scen {

// Empty lists and zeros take the defaults of --quick or --full.
struct YarnOptions : CommonOptions {
  std::vector<std::string> variants;  // context_variant_names()
  std::vector<double> factors;        // s = L'/L of the variants that have one
  int64_t length = 0;                 // tokens scored of each document, from its begin
  int64_t docs = 0;                   // documents of at least that length
  // Sliding windows: tokens that the model sees (bos included), and the stride; 0: half of it.
  std::vector<int64_t> windows;
  int64_t stride = 0;
  std::vector<std::string> window_variants;
  int64_t window_docs = 0, window_length = 0;
  int64_t chunk = 1024;  // new tokens a forward pass
  // Fine-tuning, off at 0: steps of each phase, contexts of the phases, tokens a step.
  int64_t finetune = 0;
  std::vector<int64_t> finetune_contexts;  // default 4 L and 8 L, as V3's 8 L and 32 L
  std::vector<std::string> finetune_variants;
  double finetune_factor = 0;  // default: the smallest that covers `length`
  int64_t finetune_tokens = 8192;
  double finetune_lr = 2e-4;  // the end of the shipped model's schedule
};

// Throws v3b::Error. Returns an exit code of DESIGN 4: 1 when a loss was not a number.
int run_yarn_perplexity(const YarnOptions& o);

// ---- parts, for tests
// --------------------------------------------------------------------------------------
struct ContextVariant {
  std::string name;
  model::RopeScaling scaling;  // original_max_position_embeddings = L always given
  spec::Flags flags;           // of the forward pass, yarn_ramp by variant
  bool has_factor = true;      // s is a parameter (else it follows the length, or there is none)
  bool dynamic = false;        // rotations follow the current length l
  std::string params() const;  // for the `params` column
};
// none, pi, ntk, dynamic-ntk, dynamic-ntk-alpha, ntk-by-parts, yarn, yarn-no-temp, yarn-paper-ramp,
// yarn-cos-sin, dynamic-yarn.
const std::vector<std::string>& context_variant_names();
// L: the trained context. `flags` are the other choices of the forward pass; yarn-paper-ramp sets its
// own ramp. Throws Error(usage) naming the legal names, or on a factor below 1.
ContextVariant context_variant(const std::string& name, int64_t L, double factor,
                               const spec::Flags& flags = {});
// The same rotations as a dynamic variant has at current length l (SPEC 1.4.3), as a static
// variant: base' and s do not depend on the position, so a table for l serves every pass of a
// document. Static variants return themselves.
ContextVariant at_length(const ContextVariant& v, int64_t l);

// Weights shared, configuration replaced.
model::WeightsPtr with_scaling(const model::WeightsPtr& w, const model::RopeScaling& scaling);

// Positions [begin, end) between powers of two times L: 0, L, 2L, ..., length.
struct PositionBin {
  int64_t begin = 0, end = 0;
};
std::vector<PositionBin> position_bins(int64_t L, int64_t length);

// Losses of the predictions made at positions begin..end-1, ids[begin+1..end], by passes of `chunk`
// tokens onto one growing cache.
std::vector<double> range_losses(model::Backend& backend, std::span<const int32_t> ids,
                                 int64_t begin, int64_t end, int64_t chunk);

// A document's losses under a variant, summed by bin. Dynamic variants: the losses of bin [a, b)
// come from a pass over the first b tokens with the rotations of l = b. Backends are made by name.
struct BinSums {
  std::vector<double> nll;  // by bin, nats
  std::vector<int64_t> tokens;
};
class VariantRunner {
 public:
  VariantRunner(std::string backend, model::WeightsPtr weights, ContextVariant variant,
                int64_t max_context, int64_t threads);
  std::vector<double> losses(std::span<const int32_t> ids, int64_t begin, int64_t end, int64_t l,
                             int64_t chunk);  // under the rotations of length l
  BinSums by_bin(std::span<const int32_t> ids, const std::vector<PositionBin>& bins, int64_t chunk);

 private:
  std::string backend_name_;
  model::WeightsPtr weights_;
  ContextVariant variant_;
  int64_t max_context_, threads_;
  int64_t made_for_ = -1;  // length whose rotations `backend_` has
  std::unique_ptr<model::Backend> backend_;
};

// Throws Error(usage) for rotations that training does not have.
void check_finetune_variant(const ContextVariant& v);
// Two-phase fine-tune of `model_dir` with the variant's rotations; returns the folder of the
// result. Finished phases found under `out` are taken over when resuming.
std::string finetune_variant(const YarnOptions& o, const std::string& model_dir,
                             const ContextVariant& v, const std::string& out);

}  // namespace v3b::scen
