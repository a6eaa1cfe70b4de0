// Part (a): the experts' load of a trained model on held-out text, layer by layer, with the
// selection bias and the group limit on and off, and what each setting costs in cross-entropy.
#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <map>
#include <numeric>

#include "model/error.h"
#include "scenarios/backend_factory.h"
#include "scenarios/device.h"
#include "scenarios/expert_load_rows.h"

namespace v3b::scen {
namespace {

struct Setting {
  bool bias, group_limit;
};

struct Measured {
  std::map<int64_t, LoadCounter> layers;  // the MTP layer is num_hidden_layers
  DocumentLoss loss;
};

Measured measure(model::Backend& backend, const std::vector<TextWindow>& windows, size_t docs,
                 int64_t batch_windows, bool mtp, Progress& progress) {
  const auto& c = backend.config();
  Measured m{{}, DocumentLoss(docs)};
  const auto count = [&](const model::LayerRoutes& r) {
    const auto it = m.layers.try_emplace(r.layer, c.n_routed_experts, c.n_group).first;
    it->second.add(r.idx, r.K);
  };
  for (size_t w0 = 0; w0 < windows.size(); w0 += static_cast<size_t>(batch_windows)) {
    std::vector<std::unique_ptr<model::Sequence>> sequences;
    std::vector<model::BatchItem> items;
    for (int64_t b = 0; b < batch_windows; ++b) {
      sequences.push_back(backend.new_sequence());
      items.push_back({sequences.back().get(), windows[w0 + static_cast<size_t>(b)].ids});
    }
    const auto results = backend.forward_batch(
        items,
        {.logits = model::LogitsOf::all, .hidden = mtp, .layer_hidden = false, .routes = true});
    for (size_t b = 0; b < results.size(); ++b) {
      const TextWindow& w = windows[w0 + b];
      m.loss.add(w, sequence_losses(results[b], c.vocab_size, w.ids));
      for (const auto& r : results[b].routes) count(r);
      if (mtp) {
        const auto r =
            backend.mtp_forward(*items[b].sequence, w.ids.subspan(1),
                                std::span(results[b].hidden)
                                    .first((w.ids.size() - 1) * static_cast<size_t>(c.hidden_size)),
                                {.logits = model::LogitsOf::none, .routes = true});
        for (const auto& x : r.routes) count(x);
      }
      progress.advance(static_cast<double>(w.ids.size()));
    }
    for (auto& [layer, counter] : m.layers) counter.end_batch();
  }
  return m;
}

}  // namespace

int64_t window_length(const ExpertLoadOptions& o, const model::ModelConfig& c) {
  return o.window > 0 ? o.window : std::min<int64_t>(512, c.max_position_embeddings);
}

std::vector<TextWindow> cut_windows(const TokenSet& set, int64_t window, int64_t tokens,
                                    int64_t batch_windows) {
  std::vector<TextWindow> all, some;
  for (size_t d = 0; d < set.docs.size(); ++d) {
    const std::span<const int32_t> ids(set.docs[d].ids);
    const auto bytes = set.docs[d].token_bytes.begin();
    for (size_t b = 0; b + static_cast<size_t>(window) <= ids.size();
         b += static_cast<size_t>(window)) {
      const auto first = bytes + static_cast<std::ptrdiff_t>(b);
      all.push_back({ids.subspan(b, static_cast<size_t>(window)), d,
                     std::accumulate(first + 1, first + window, int64_t{0})});
    }
  }
  const auto count = static_cast<int64_t>(all.size());
  int64_t n = std::min(count, std::max<int64_t>(1, tokens / window));
  n = n / batch_windows * batch_windows;
  if (n == 0)
    throw Error(ExitCode::nothing_ran, "too little text for one batch", set.name,
                fmt::format("{} windows of {} tokens", batch_windows, window),
                fmt::format("{}", count));
  for (int64_t i = 0; i < n; ++i) some.push_back(all[static_cast<size_t>(i * count / n)]);
  return some;
}

void DocumentLoss::add(const TextWindow& w, const std::vector<double>& losses) {
  for (const double l : losses) {
    if (!std::isfinite(l))
      throw Error(ExitCode::check_failed, "loss is not finite", "expert-load", "a number",
                  fmt::format("{}", l));
    nats_[w.doc] += l;
    tokens_[w.doc] += 1;
  }
}
void DocumentLoss::set(rep::Record& r, double bytes) const {
  const double nats = std::accumulate(nats_.begin(), nats_.end(), 0.0),
               tokens = std::accumulate(tokens_.begin(), tokens_.end(), 0.0);
  r.set("cross_entropy", nats / tokens).set("bits_per_byte", nats / std::log(2.0) / bytes);
}
void DocumentLoss::set_change(rep::Record& r, const DocumentLoss& base, uint64_t seed) const {
  std::vector<double> change, weight;
  for (size_t d = 0; d < nats_.size(); ++d)
    if (tokens_[d] > 0) {
      change.push_back(nats_[d] - base.nats_[d]);
      weight.push_back(tokens_[d]);
    }
  const auto ci = bootstrap_ratio(change, weight, seed);
  r.set("cross_entropy_change", ci.mean)
      .set("change_low", ci.interval.low)
      .set("change_high", ci.interval.high);
}

void expert_load_model(const ExpertLoadOptions& o, rep::CsvWriter& csv) {
  const LoadedModel m = load_model(o);
  const auto& c = m.config();
  if (c.n_routed_experts == 0)
    throw Error(ExitCode::bad_input, "model has no experts", m.name, "n_routed_experts > 0", "0");
  const int64_t window = window_length(o, c);
  const TokenSet set = load_tokens(o, m, {.min_tokens = window});
  const auto windows = cut_windows(set, window, o.tokens, o.batch_windows);
  const auto T = static_cast<int64_t>(windows.size()) * window, batch = o.batch_windows * window;
  const bool has_bias = c.topk_method == model::TopkMethod::noaux_tc;
  const bool has_groups = c.topk_method != model::TopkMethod::greedy && c.n_group > 1;
  const bool mtp = !m.weights->mtp.empty();
  double bytes = 0;  // of the scored tokens
  for (const auto& w : windows) bytes += static_cast<double>(w.bytes);

  const auto row = [&](const Setting& s, const std::string& layer) {
    rep::Record r;
    r.set("part", "model").set("model", m.name).set("tokens_from", set.name).set("layer", layer);
    r.set("bias", s.bias ? "on" : "off").set("group_limit", s.group_limit ? "on" : "off");
    r.set("experts", c.n_routed_experts)
        .set("top_k", c.num_experts_per_tok)
        .set("groups", c.n_group);
    r.set("groups_kept", c.topk_group).set("tokens", T).set("impl", o.backend);
    return r;
  };
  if (!device_missing(o).empty()) {
    rep::Record all = row({true, true}, "all");
    if (!csv.has(all)) write_row(o, csv, set_device_missing(all, o));
    return;
  }
  std::map<int64_t, double> floors;  // by T
  const auto noise_floor = [&](int64_t t) {
    const auto it = floors.find(t);
    if (it != floors.end()) return it->second;
    return floors[t] = maxvio_noise_floor(c.n_routed_experts, c.num_experts_per_tok, t, o.seed);
  };
  const std::vector<Setting> settings = {
      {true, true}, {false, true}, {true, false}, {false, false}};
  Progress progress("expert-load model", static_cast<double>(T) * 4);
  DocumentLoss base(0);
  for (const Setting& s : settings) {
    rep::Record all = row(s, "all");
    const std::string missing = !s.bias && !has_bias            ? "the router has no selection bias"
                                : !s.group_limit && !has_groups ? "the router has no group limit"
                                                                : "";
    if (!missing.empty()) {
      if (!csv.has(all)) write_row(o, csv, all.set("status", "unsupported").set("reason", missing));
      progress.advance(static_cast<double>(T));
      continue;
    }
    const bool is_base = s.bias && s.group_limit;
    if (csv.has(all) &&
        !is_base) {  // the first setting's losses are needed for the others' differences
      progress.advance(static_cast<double>(T));
      continue;
    }
    progress.show(fmt::format("bias {}, group limit {}", s.bias ? "on" : "off",
                              s.group_limit ? "on" : "off"));
    model::BackendOptions b = backend_options(o);
    b.flags.ignore_selection_bias = !s.bias;
    b.flags.ignore_group_limit = !s.group_limit;
    const auto backend = make_backend(o.backend, m.weights, b);
    const Measured x = measure(*backend, windows, set.docs.size(), o.batch_windows, mtp, progress);
    if (is_base) base = x.loss;

    double vio_batch = 0, vio_global = 0, groups = 0;
    for (const auto& [layer, counter] : x.layers) {
      rep::Record r = row(s, layer >= c.num_hidden_layers ? "mtp" : std::to_string(layer));
      const int64_t t = counter.tokens(), per_batch = t / counter.batches();
      r.set("batch_tokens", per_batch).set("batches", counter.batches());
      r.set("maxvio_batch", counter.maxvio_batch())
          .set("maxvio_batch_max", counter.maxvio_batch_max());
      r.set("noise_floor_batch", noise_floor(per_batch));
      r.set("noise_floor_global", noise_floor(t));
      set_load(r, counter.load());
      r.set("groups_per_token", counter.groups_per_token()).set("status", "ok");
      vio_batch += counter.maxvio_batch();
      vio_global += std::stod(r.text("maxvio_global"));
      groups += counter.groups_per_token();
      if (!csv.has(r)) write_row(o, csv, r);
    }
    const auto layers = static_cast<double>(x.layers.size());
    all.set("batch_tokens", batch)
        .set("batches", static_cast<int64_t>(windows.size()) / o.batch_windows);
    all.set("maxvio_batch", vio_batch / layers).set("maxvio_global", vio_global / layers);
    all.set("noise_floor_batch", noise_floor(batch));
    all.set("noise_floor_global", noise_floor(T));
    all.set("groups_per_token", groups / layers);
    x.loss.set(all, bytes);
    if (!is_base) x.loss.set_change(all, base, o.seed);
    if (!m.trained) all.set("reason", "random weights");
    if (!csv.has(all)) write_row(o, csv, all.set("status", "ok"));
  }
  progress.finish();
}

}  // namespace v3b::scen
