// Columns and shared pieces of the expert-load scenario. Internal to scenarios/expert_load*.cpp.
#pragma once
#include <string>
#include <vector>

#include "reports/csv.h"
#include "scenarios/expert_load.h"

namespace v3b::scen {

const std::vector<std::string>& expert_load_columns();
const std::vector<std::string>& expert_load_keys();
// max/mean, min/mean, CV, Gini, entropy, dead experts, MaxVio_global of a load.
void set_load(rep::Record& r, const std::vector<int64_t>& load);
// Adds `params` and identity.
void write_row(const ExpertLoadOptions& o, rep::CsvWriter& csv, rep::Record& r);

// A window of full length, so that every batch has the same T, which the noise floor needs.
struct TextWindow {
  std::span<const int32_t> ids;
  size_t doc;
  int64_t bytes;  // of ids[1..]
};
int64_t window_length(const ExpertLoadOptions& o, const model::ModelConfig& c);  // tokens
// About `tokens` tokens, spread evenly, a multiple of `batch_windows` windows. Throws
// Error(nothing_ran) when the text has none.
std::vector<TextWindow> cut_windows(const TokenSet& set, int64_t window, int64_t tokens,
                                    int64_t batch_windows);

// Losses by document, so that settings can be paired.
class DocumentLoss {
 public:
  explicit DocumentLoss(size_t docs) : nats_(docs), tokens_(docs) {}
  // Throws Error(check_failed) on a loss that is no number.
  void add(const TextWindow& w, const std::vector<double>& losses);
  void set(rep::Record& r, double bytes) const;  // cross_entropy, bits_per_byte
  // cross_entropy_change and its interval, against `base` on the same tokens.
  void set_change(rep::Record& r, const DocumentLoss& base, uint64_t seed) const;

 private:
  std::vector<double> nats_, tokens_;
};
double ref_max_vio(const std::vector<int64_t>& load);

void expert_load_capacity(const ExpertLoadOptions& o, rep::CsvWriter& csv);
void expert_load_model(const ExpertLoadOptions& o, rep::CsvWriter& csv);
void expert_load_training(const ExpertLoadOptions& o, rep::CsvWriter& csv);
void check_route_names(const ExpertLoadOptions& o);  // Error(usage) before anything runs for long
bool expert_load_routes(const ExpertLoadOptions& o,
                        rep::CsvWriter& csv);  // false: a kernel failed its check

}  // namespace v3b::scen
