// What every scenario shares: options, the model under test, held-out token sets, losses of a
// forward result, intervals, and progress. Scenarios write one CSV and print the table that
// reports/ makes of it.
#pragma once
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "bench/harness/progress.h"
#include "model/backend.h"
#include "model/weights.h"
#include "reports/csv.h"

namespace v3b::scen {

using bench::Progress;  // count, share and time left on stderr

struct CommonOptions {
  std::string out = "results";       // folder; made if needed
  std::string model;                 // checkpoint folder, "random:PRESET", or "" for model/tiny-v3
  std::string backend = "cpu_bf16";  // backend_factory.h
  std::string corpus;   // folder of scripts/build_corpus.py; "" looks for it (corpus_dir)
  std::string text;     // a text file instead of the corpus
  bool full = false;    // --full; otherwise --quick
  bool resume = false;  // keep finished rows of an earlier run
  uint64_t seed = 1;
  int64_t threads = 0;  // 0: all
  spec::Flags flags;    // of every forward pass (--flags)
  bool print_table = true;
};
// The `params` column (DESIGN 3, law 13): "seed=1;threads=2;flags=default", or the flags that differ
// from their defaults as --flags takes them. threads: those that really run.
std::string params_text(const CommonOptions& o);
// "k=v;k=v;..." -> v of one key, "" if it is not there.
std::string param_of(const std::string& params, const std::string& key);
// Flags and threads of these options.
model::BackendOptions backend_options(const CommonOptions& o);

// ---- model
// ------------------------------------------------------------------------------------------------
struct LoadedModel {
  model::WeightsPtr weights;
  std::string name;     // `model` column: last part of the path, or "random:tiny-v3"
  std::string path;     // folder, "" for random weights
  bool trained = true;  // false: random weights, said in tables
  const model::ModelConfig& config() const { return weights->config; }
};
// Throws v3b::Error (not_found, bad_input, usage) with one clear line. A backend is made with
// make_backend.
LoadedModel load_model(const CommonOptions& o);
// Short hash over name, shape and first bytes of every tensor: tells weights apart for --resume.
std::string weights_id(const model::ModelWeights& w);

// ---- text
// -------------------------------------------------------------------------------------------------
struct TokenDoc {
  std::string id, domain;            // domain: prose | code | text
  std::vector<int32_t> ids;          // ids[0] is bos; the text's tokens follow
  std::vector<int32_t> token_bytes;  // [ids] bytes that each token stands for; 0 for bos
  int64_t bytes = 0;                 // of the text that ids[1..] stand for
};
struct TokenSet {
  std::vector<TokenDoc> docs;
  std::string name;        // `tokens` column: "heldout", "heldout:16x512", or the text file's name
  int64_t tokens() const;  // bos included
};
struct TokenSetOptions {
  std::string split = "heldout";  // train | validation | heldout
  std::string domain;             // "" all, else prose | code
  int64_t max_docs = 0;           // 0: all; otherwise this many, spread evenly over the split
  int64_t min_tokens = 2;         // documents with fewer (bos included) are left out
  int64_t max_tokens = 0;         // documents are cut after this many (bos included); 0: whole
};
// Tokenizes with the tokenizer.model of the checkpoint folder (model/tiny-v3's for random weights
// of the same vocabulary); a model with vocabulary 256 reads bytes. Documents come in the split's
// order, chosen without looking at their text. Throws v3b::Error; nothing_ran when no document is
// long enough.
TokenSet load_tokens(const CommonOptions& o, const LoadedModel& m, const TokenSetOptions& t = {});
// o.corpus, else $V3BENCH_CORPUS_DIR, ./build/corpus, beside the binary, in the source tree. Throws
// not_found saying which script makes it.
std::string corpus_dir(const CommonOptions& o);

// ---- losses
// -----------------------------------------------------------------------------------------------
// -log softmax(logits)[target] in double. Throws Error(bad_input) on a target out of range; NaN
// logits give NaN.
double token_loss(const float* logits, int64_t V, int32_t target);
// Losses of ids[1..] from r.logits [T,V] of a forward over ids (LogitsOf::all): T-1 values.
std::vector<double> sequence_losses(const model::ForwardResult& r, int64_t V,
                                    std::span<const int32_t> ids);

// ---- intervals
// --------------------------------------------------------------------------------------------
struct Interval {
  double low = 0, high = 0;
};
// Wilson score interval of k successes in n trials at confidence 95% (z = 1.96); {0,1} for n = 0.
Interval wilson(int64_t k, int64_t n, double z = 1.959963984540054);
// sum(sums)/sum(weights) and its percentile bootstrap interval over documents (whole documents are
// drawn). For a paired difference give the differences' sums. Deterministic in seed. One document
// gives low = high = mean.
struct BootstrapResult {
  double mean = 0;
  Interval interval;
};
BootstrapResult bootstrap_ratio(std::span<const double> sums, std::span<const double> weights,
                                uint64_t seed, int64_t draws = 2000, double confidence = 0.95);
// Ordinary median, of a copy; NaN when empty.
double median(std::vector<double> v);

// ---- rows
// -------------------------------------------------------------------------------------------------
// Makes and checks the folder, writes machine.json, and opens DIR/file with identity columns in
// front. Rows made with other flags (their `params`) are not resumed: throws Error(usage) that names
// both.
std::unique_ptr<rep::CsvWriter> open_csv(const CommonOptions& o, const std::string& file,
                                         const std::vector<std::string>& columns,
                                         const std::vector<std::string>& key_columns);
// Prints reports' table of the file (the very one that `v3bench table` prints) and where it lies,
// to stdout.
void print_table(const rep::CsvWriter& csv);

}  // namespace v3b::scen
