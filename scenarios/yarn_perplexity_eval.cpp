// Variants of the context extension, and losses of a document under one of them.
#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <thread>

#include "bench/harness/shape_io.h"
#include "model/error.h"
#include "scenarios/backend_factory.h"
#include "scenarios/yarn_perplexity.h"

namespace v3b::scen {

using model::RopeType;

const std::vector<std::string>& context_variant_names() {
  static const std::vector<std::string> names = {
      "none",         "pi",           "ntk",  "dynamic-ntk",     "dynamic-ntk-alpha",
      "ntk-by-parts", "yarn-no-temp", "yarn", "yarn-paper-ramp", "yarn-cos-sin",
      "dynamic-yarn"};
  return names;
}

ContextVariant context_variant(const std::string& name, int64_t L, double factor,
                               const spec::Flags& flags) {
  ContextVariant v;
  v.name = name;
  v.flags = flags;
  auto& s = v.scaling;
  s.original_max_position_embeddings = L;
  s.factor = factor;
  if (!(factor >= 1 && std::isfinite(factor)))
    throw Error(ExitCode::usage, "bad scale factor", "--factors", "1 or more",
                fmt::format("{}", factor));
  const auto yarn = [&](bool temperature, bool deepseek) {
    s.type = RopeType::yarn;
    s.temperature = temperature;
    // DeepSeek: the whole logit gains get(s,1)^2; original YaRN: cos and sin gain get(s,1).
    if (temperature && deepseek) s.mscale = s.mscale_all_dim = 1;
  };
  if (name == "none") {
    v.has_factor = false;
    s.factor = 1;
  } else if (name == "pi") {
    s.type = RopeType::linear;
  } else if (name == "ntk") {
    s.type = RopeType::ntk;
  } else if (name == "dynamic-ntk") {  // alpha = 1: s = max(1, l/L)
    s.type = RopeType::dynamic;
    s.factor = 1;
    v.has_factor = false;
    v.dynamic = true;
  } else if (name == "dynamic-ntk-alpha") {  // alpha = factor, as in transformers
    s.type = RopeType::dynamic;
    v.dynamic = true;
  } else if (name == "ntk-by-parts") {  // the paper's ramp without temperature
    s.type = RopeType::ntk_by_parts;
  } else if (name == "yarn") {
    yarn(true, true);
  } else if (name == "yarn-no-temp") {
    yarn(false, true);
  } else if (name == "yarn-paper-ramp") {
    yarn(true, true);
    v.flags.yarn_ramp = spec::YarnRamp::paper;
  } else if (name == "yarn-cos-sin") {
    yarn(true, false);
  } else if (name == "dynamic-yarn") {  // s = max(1, l/L)
    yarn(true, true);
    s.factor = 1;
    s.dynamic = true;
    v.has_factor = false;
    v.dynamic = true;
  } else {
    std::string names;
    for (const auto& n : context_variant_names()) names += (names.empty() ? "" : ", ") + n;
    throw Error(ExitCode::usage, "unknown context extension", "--variants", names, name);
  }
  return v;
}

std::string ContextVariant::params() const {
  std::string p =
      fmt::format("rope_type={};factor={};original={}", model::rope_type_name(scaling.type),
                  scaling.factor, scaling.original_max_position_embeddings);
  if (scaling.type == RopeType::yarn || scaling.type == RopeType::ntk_by_parts) {
    const bool paper =
        scaling.type == RopeType::ntk_by_parts || flags.yarn_ramp == spec::YarnRamp::paper;
    p += fmt::format(";yarn_ramp={};beta_fast={};beta_slow={}", paper ? "paper" : "index",
                     scaling.beta_fast, scaling.beta_slow);
  }
  if (scaling.type == RopeType::yarn)
    p += fmt::format(";temperature={};mscale={};mscale_all_dim={}", scaling.temperature ? 1 : 0,
                     scaling.mscale, scaling.mscale_all_dim);
  if (dynamic) p += ";dynamic=1";
  return p + ";yarn_when=" + bench::field_to_text(flags.yarn_when);
}

ContextVariant at_length(const ContextVariant& v, int64_t l) {
  ContextVariant r = v;
  r.dynamic = false;
  if (!v.dynamic) return r;
  const double L = static_cast<double>(v.scaling.original_max_position_embeddings);
  const double ratio = std::max(1.0, static_cast<double>(l) / L);
  if (v.scaling.type == RopeType::dynamic) {
    r.scaling.type = ratio > 1 ? RopeType::ntk : RopeType::none;
    r.scaling.factor = ratio > 1 ? v.scaling.factor * ratio - (v.scaling.factor - 1) : 1;
  } else {
    r.scaling.dynamic = false;
    r.scaling.factor = ratio;
  }
  return r;
}

model::WeightsPtr with_scaling(const model::WeightsPtr& w, const model::RopeScaling& scaling) {
  auto copy = std::make_shared<model::ModelWeights>(*w);
  copy->config.rope_scaling = scaling;
  return copy;
}

std::vector<PositionBin> position_bins(int64_t L, int64_t length) {
  std::vector<PositionBin> bins;
  for (int64_t begin = 0, end = L; begin < length; begin = end, end *= 2)
    bins.push_back({begin, std::min(end, length)});
  return bins;
}

std::vector<double> range_losses(model::Backend& backend, std::span<const int32_t> ids,
                                 int64_t begin, int64_t end, int64_t chunk) {
  if (begin < 0 || begin >= end || end + 1 > static_cast<int64_t>(ids.size()) || chunk < 1)
    throw Error(ExitCode::usage, "bad range of positions", "range_losses",
                fmt::format("0 <= begin < end < {}", ids.size()),
                fmt::format("{}..{}", begin, end));
  const int64_t V = backend.config().vocab_size;
  const auto sequence = backend.new_sequence();
  std::vector<double> loss(static_cast<size_t>(end - begin));
  for (int64_t at = 0; at < end; at += chunk) {
    const int64_t n = std::min(chunk, end - at);
    model::ForwardOptions o;
    o.logits = at + n > begin ? model::LogitsOf::all : model::LogitsOf::none;
    const auto r =
        backend.forward(*sequence, ids.subspan(static_cast<size_t>(at), static_cast<size_t>(n)), o);
    if (o.logits == model::LogitsOf::none) continue;
    const int64_t first = std::max(at, begin);
    const auto part = [&](int64_t from, int64_t to) {
      for (int64_t p = from; p < to; ++p)
        loss[static_cast<size_t>(p - begin)] =
            token_loss(r.logits.data() + (p - at) * V, V, ids[static_cast<size_t>(p + 1)]);
    };
    const int64_t threads = std::min<int64_t>(8, std::max(1U, std::thread::hardware_concurrency()));
    const int64_t rows = at + n - first;
    std::vector<std::thread> pool;
    for (int64_t t = 1; t < threads; ++t)
      pool.emplace_back(part, first + rows * t / threads, first + rows * (t + 1) / threads);
    part(first, first + rows / threads);
    for (auto& t : pool) t.join();
  }
  return loss;
}

VariantRunner::VariantRunner(std::string backend, model::WeightsPtr weights, ContextVariant variant,
                             int64_t max_context, int64_t threads)
    : backend_name_(std::move(backend)),
      weights_(std::move(weights)),
      variant_(std::move(variant)),
      max_context_(max_context),
      threads_(threads) {}

std::vector<double> VariantRunner::losses(std::span<const int32_t> ids, int64_t begin, int64_t end,
                                          int64_t l, int64_t chunk) {
  if (!variant_.dynamic) l = 0;
  if (l != made_for_) {
    const ContextVariant fixed = at_length(variant_, l);
    model::BackendOptions o;
    o.flags = fixed.flags;
    o.threads = threads_;
    o.max_context = max_context_;
    backend_ = make_backend(backend_name_, with_scaling(weights_, fixed.scaling), o);
    made_for_ = l;
  }
  return range_losses(*backend_, ids, begin, end, chunk);
}

BinSums VariantRunner::by_bin(std::span<const int32_t> ids, const std::vector<PositionBin>& bins,
                              int64_t chunk) {
  BinSums sums;
  std::vector<double> all;
  if (!variant_.dynamic) all = losses(ids, 0, bins.back().end, 0, chunk);
  for (const auto& b : bins) {
    const std::vector<double> own =
        variant_.dynamic ? losses(ids, b.begin, b.end, b.end, chunk)
                         : std::vector<double>(all.begin() + b.begin, all.begin() + b.end);
    double nll = 0;
    for (const double x : own) nll += x;
    sums.nll.push_back(nll);
    sums.tokens.push_back(b.end - b.begin);
  }
  return sums;
}

}  // namespace v3b::scen
