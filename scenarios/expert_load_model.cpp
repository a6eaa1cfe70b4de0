// Part (a): the experts' load of a trained model on held-out text, layer by layer, with the
// selection bias and the group limit on and off, and what each setting costs in cross-entropy.
#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <map>
#include <numeric>

#include "model/error.h"
#include "scenarios/backend_factory.h"
#include "scenarios/expert_load_rows.h"

namespace v3b::scen {
namespace {

struct Window {
  std::span<const int32_t> ids;
  size_t doc;
  int64_t bytes;  // of ids[1..]
};

struct Setting {
  bool bias, group_limit;
};

// Only windows of full length: every batch has the same T, which the noise floor needs.
std::vector<Window> cut_windows(const TokenSet& set, int64_t window, int64_t tokens,
                                int64_t batch_windows) {
  std::vector<Window> all, some;
  for (size_t d = 0; d < set.docs.size(); ++d) {
    const std::span<const int32_t> ids(set.docs[d].ids);
    for (size_t b = 0; b + static_cast<size_t>(window) <= ids.size();
         b += static_cast<size_t>(window))
      all.push_back({ids.subspan(b, static_cast<size_t>(window)), d,
                     std::accumulate(
                         set.docs[d].token_bytes.begin() + static_cast<std::ptrdiff_t>(b) + 1,
                         set.docs[d].token_bytes.begin() + static_cast<std::ptrdiff_t>(b) + window,
                         int64_t{0})});
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

struct Loss {  // by document, so that settings can be paired
  std::vector<double> nats, tokens;
  double total() const { return sum(nats) / sum(tokens); }
  static double sum(const std::vector<double>& v) {
    double s = 0;
    for (const double x : v) s += x;
    return s;
  }
};

struct Measured {
  std::map<int64_t, LoadCounter> layers;  // the MTP layer is num_hidden_layers
  Loss loss;
};

Measured measure(model::Backend& backend, const std::vector<Window>& windows, size_t docs,
                 int64_t batch_windows, bool mtp, Progress& progress) {
  const auto& c = backend.config();
  Measured m;
  m.loss.nats.assign(docs, 0);
  m.loss.tokens.assign(docs, 0);
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
      const Window& w = windows[w0 + b];
      for (const double l : sequence_losses(results[b], c.vocab_size, w.ids)) {
        if (!std::isfinite(l))
          throw Error(ExitCode::check_failed, "loss is not finite", "expert-load", "a number",
                      fmt::format("{}", l));
        m.loss.nats[w.doc] += l;
        m.loss.tokens[w.doc] += 1;
      }
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

void expert_load_model(const ExpertLoadOptions& o, rep::CsvWriter& csv) {
  const LoadedModel m = load_model(o);
  const auto& c = m.config();
  if (c.n_routed_experts == 0)
    throw Error(ExitCode::bad_input, "model has no experts", m.name, "n_routed_experts > 0", "0");
  const int64_t window =
      o.window > 0 ? o.window : std::min<int64_t>(512, c.max_position_embeddings);
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
  std::map<int64_t, double> floors;  // by T
  const auto noise_floor = [&](int64_t t) {
    const auto it = floors.find(t);
    if (it != floors.end()) return it->second;
    return floors[t] = maxvio_noise_floor(c.n_routed_experts, c.num_experts_per_tok, t, o.seed);
  };
  const std::vector<Setting> settings = {
      {true, true}, {false, true}, {true, false}, {false, false}};
  Progress progress("expert-load model", static_cast<double>(T) * 4);
  Loss base;
  for (const Setting& s : settings) {
    rep::Record all = row(s, "all");
    const std::string missing = !s.bias && !has_bias            ? "the router has no selection bias"
                                : !s.group_limit && !has_groups ? "the router has no group limit"
                                                                : "";
    if (!missing.empty()) {
      if (!csv.has(all))
        csv.write(
            all.set("status", "unsupported").set("reason", missing).set(rep::identity("cpu")));
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
    model::BackendOptions b;
    b.threads = o.threads;
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
      if (!csv.has(r)) csv.write(r.set(rep::identity("cpu")));
    }
    const auto layers = static_cast<double>(x.layers.size());
    all.set("batch_tokens", batch)
        .set("batches", static_cast<int64_t>(windows.size()) / o.batch_windows);
    all.set("maxvio_batch", vio_batch / layers).set("maxvio_global", vio_global / layers);
    all.set("noise_floor_batch", noise_floor(batch));
    all.set("noise_floor_global", noise_floor(T));
    all.set("groups_per_token", groups / layers);
    all.set("cross_entropy", x.loss.total())
        .set("bits_per_byte", Loss::sum(x.loss.nats) / std::log(2.0) / bytes);
    if (!is_base) {
      std::vector<double> change, weight;
      for (size_t d = 0; d < x.loss.nats.size(); ++d)
        if (x.loss.tokens[d] > 0) {
          change.push_back(x.loss.nats[d] - base.nats[d]);
          weight.push_back(x.loss.tokens[d]);
        }
      const auto ci = bootstrap_ratio(change, weight, o.seed);
      all.set("cross_entropy_change", ci.mean)
          .set("change_low", ci.interval.low)
          .set("change_high", ci.interval.high);
    }
    if (!m.trained) all.set("reason", "random weights");
    if (!csv.has(all)) csv.write(all.set("status", "ok").set(rep::identity("cpu")));
  }
  progress.finish();
}

}  // namespace v3b::scen
