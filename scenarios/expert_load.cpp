// The expert-load scenario: options, metrics, and the order of its three parts.
#include "scenarios/expert_load.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>

#include "bench/harness/flags_text.h"
#include "model/error.h"
#include "model/rng.h"
#include "reference/balance.h"
#include "reports/machine.h"
#include "scenarios/device.h"
#include "scenarios/expert_load_rows.h"
#include "scenarios/training.h"

namespace v3b::scen {
namespace {

constexpr const char* kParts[] = {"model", "capacity", "training", "synthetic"};

ExpertLoadOptions with_defaults(ExpertLoadOptions o) {
  if (o.parts.empty()) o.parts.assign(std::begin(kParts), std::end(kParts));
  for (const auto& p : o.parts)
    if (std::find(std::begin(kParts), std::end(kParts), p) == std::end(kParts))
      throw Error(ExitCode::usage, "unknown part", "--parts",
                  "model, capacity, training or synthetic", "'" + p + "'");
  if (o.flags.ignore_selection_bias || o.flags.ignore_group_limit)
    throw Error(ExitCode::usage, "expert-load itself runs with both settings", "--flags",
                "no ignore_selection_bias, no ignore_group_limit",
                bench::changed_flags_text(o.flags));
  if (o.capacity_factors.empty()) o.capacity_factors = {1, 1.25, 1.5, 2};
  for (const double f : o.capacity_factors)
    if (!(f > 0 && std::isfinite(f)))
      throw Error(ExitCode::usage, "bad capacity factor", "--capacity-factors", "more than 0",
                  fmt::format("{}", f));
  if (o.drop_policies.empty())
    o.drop_policies = o.full ? std::vector<std::string>{"slot", "token", "prob"}
                             : std::vector<std::string>{"slot"};
  if (o.strategies.empty()) o.strategies = {"none", "switch", "sequence", "bias", "bias+sequence"};
  const auto fill = [](auto& v, auto value) {
    if (v == 0) v = value;
    if (!(v > 0))
      throw Error(ExitCode::usage, "option must be positive", "expert-load", "more than 0",
                  fmt::format("{}", v));
  };
  fill(o.tokens, o.full ? int64_t{131072} : int64_t{16384});
  fill(o.capacity_tokens, o.full ? int64_t{16384} : int64_t{4096});
  fill(o.batch_windows, int64_t{4});
  fill(o.train_steps, o.full ? int64_t{400} : int64_t{80});
  fill(o.train_batch, o.full ? int64_t{8} : int64_t{4});
  fill(o.train_context, int64_t{256});
  fill(o.bias_speed, o.full ? 1e-3 : 5e-3);
  if (o.route_tokens < 0)
    throw Error(ExitCode::usage, "option must be positive", "--route-tokens", "more than 0",
                fmt::format("{}", o.route_tokens));
  fill(o.route_seconds, o.full ? 0.5 : 0.15);
  if (o.window < 0)
    throw Error(ExitCode::usage, "option must be positive", "--window", "more than 0",
                fmt::format("{}", o.window));
  return o;
}

}  // namespace

const std::vector<std::string>& expert_load_columns() {
  static const std::vector<std::string> columns = {
      "part", "model", "tokens_from", "layer", "bias", "group_limit", "strategy", "step", "routes",
      "experts", "top_k", "groups", "groups_kept",
      // the load
      "tokens", "batch_tokens", "batches", "maxvio_batch", "maxvio_batch_max", "noise_floor_batch",
      "maxvio_global", "noise_floor_global", "max_over_mean", "min_over_mean", "cv", "gini",
      "entropy", "dead_experts", "groups_per_token",
      // losses
      "cross_entropy", "bits_per_byte", "cross_entropy_change", "change_low", "change_high",
      "train_loss", "val_loss", "val_bits_per_byte", "aux_loss", "bias_speed", "tokens_per_s",
      // measured expert layer
      "impl", "isa", "check", "check_reason", "samples", "q1_us", "median_us", "q3_us",
      "time_over_uniform", "gflop_s", "gb_s", "roof", "pct_of_roof", "repro", "status", "reason",
      // dropping
      "capacity_factor", "drop_policy", "dropped_pct", "params"};
  return columns;
}

const std::vector<std::string>& expert_load_keys() {
  static const std::vector<std::string> keys = {"part",   "model",       "tokens_from", "layer",
                                                "bias",   "group_limit", "strategy",    "step",
                                                "routes", "tokens",      "impl"};
  return keys;
}

void set_load(rep::Record& r, const std::vector<int64_t>& load) {
  const auto m = ref::load_metrics(static_cast<int64_t>(load.size()), load.data());
  r.set("maxvio_global", m.max_vio)
      .set("max_over_mean", m.max_over_mean)
      .set("min_over_mean", m.min_over_mean);
  r.set("cv", m.cv).set("gini", m.gini).set("entropy", m.entropy).set("dead_experts", m.dead);
}

double ref_max_vio(const std::vector<int64_t>& load) {
  return ref::load_metrics(static_cast<int64_t>(load.size()), load.data()).max_vio;
}

void write_row(const ExpertLoadOptions& o, rep::CsvWriter& csv, rep::Record& r) {
  // Training runs on the CPU whatever the backend is.
  const std::string device = r.text("part") == "training" ? "cpu" : device_column(o);
  csv.write(r.set("params", params_text(o)).set(rep::identity(device)));
}

LoadCounter::LoadCounter(int64_t experts, int64_t groups)
    : experts_(experts),
      group_size_(experts / std::max<int64_t>(groups, 1)),
      open_(static_cast<size_t>(experts)),
      total_(static_cast<size_t>(experts)) {}

void LoadCounter::add(std::span<const int32_t> idx, int64_t K) {
  if (K < 1 || static_cast<int64_t>(idx.size()) % K != 0)
    throw Error(ExitCode::usage, "routes are not [n, K]", "LoadCounter",
                fmt::format("a multiple of {}", K), fmt::format("{}", idx.size()));
  std::vector<char> seen(static_cast<size_t>(experts_ / group_size_) + 1);
  for (size_t t = 0; t < idx.size(); t += static_cast<size_t>(K)) {
    std::fill(seen.begin(), seen.end(), 0);
    for (int64_t k = 0; k < K; ++k) {
      const int32_t e = idx[t + static_cast<size_t>(k)];
      if (e < 0 || e >= experts_)
        throw Error(ExitCode::bad_input, "route to an expert that does not exist", "LoadCounter",
                    fmt::format("0..{}", experts_ - 1), fmt::format("{}", e));
      ++open_[static_cast<size_t>(e)];
      ++total_[static_cast<size_t>(e)];
      char& s = seen[static_cast<size_t>(e / group_size_)];
      groups_ += s == 0;
      s = 1;
    }
    ++tokens_;
  }
}

void LoadCounter::end_batch() {
  const double v = ref::load_metrics(experts_, open_.data()).max_vio;
  sum_ += v;
  worst_ = batches_ == 0 ? v : std::max(worst_, v);
  ++batches_;
  std::fill(open_.begin(), open_.end(), 0);
}

double LoadCounter::maxvio_batch() const { return sum_ / static_cast<double>(batches_); }
double LoadCounter::groups_per_token() const {
  return static_cast<double>(groups_) / static_cast<double>(tokens_);
}

double maxvio_noise_floor(int64_t E, int64_t K, int64_t T, uint64_t seed) {
  if (E < 1 || K < 1 || K > E || T < 1)
    throw Error(ExitCode::usage, "noise floor needs 1 <= K <= E and T >= 1", "maxvio_noise_floor");
  constexpr int64_t kWork = 2'000'000;  // routes in all: some 20 ms
  const int64_t draws = std::clamp<int64_t>(kWork / (T * K), 16, 200);
  std::vector<int32_t> order(static_cast<size_t>(E));
  std::vector<int64_t> load(static_cast<size_t>(E));
  double sum = 0;
  for (int64_t d = 0; d < draws; ++d) {
    for (int64_t i = 0; i < E; ++i) order[static_cast<size_t>(i)] = static_cast<int32_t>(i);
    std::fill(load.begin(), load.end(), 0);
    const model::Rng rng{seed, static_cast<uint64_t>(d)};
    uint64_t n = 0;
    for (int64_t t = 0; t < T; ++t)
      for (int64_t k = 0; k < K; ++k) {  // first K of a shuffle; `order` stays a permutation
        const int64_t j = k + model::rng_below(rng, n++, E - k);
        std::swap(order[static_cast<size_t>(k)], order[static_cast<size_t>(j)]);
        ++load[static_cast<size_t>(order[static_cast<size_t>(k)])];
      }
    sum += ref::load_metrics(E, load.data()).max_vio;
  }
  return sum / static_cast<double>(draws);
}

int run_expert_load(const ExpertLoadOptions& options) {
  const ExpertLoadOptions o = with_defaults(options);
  check_route_names(o);
  for (const auto& s : o.strategies) (void)parse_balance(s);
  const auto csv = open_csv(o, "expert_load.csv", expert_load_columns(), expert_load_keys());
  const auto wanted = [&](const char* part) {
    return std::find(o.parts.begin(), o.parts.end(), part) != o.parts.end();
  };
  bool passed = true;
  if (wanted("model")) expert_load_model(o, *csv);
  if (wanted("capacity")) expert_load_capacity(o, *csv);
  if (wanted("synthetic")) passed = expert_load_routes(o, *csv);
  if (wanted("training")) expert_load_training(o, *csv);
  rep::write_machine_json(o.out);
  if (o.print_table) print_table(*csv);
  finish_device(o);
  return static_cast<int>(passed ? ExitCode::ok : ExitCode::check_failed);
}

}  // namespace v3b::scen
