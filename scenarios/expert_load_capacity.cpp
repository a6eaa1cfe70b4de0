// Part (d): what a capacity factor drops of a trained model's assignments on held-out text, and what
// that costs in cross-entropy (SPEC 1.15), with the selection bias on and off. The backend itself
// drops: an assignment beyond the capacity adds nothing to its token in any later layer either.
// One sequence a call, so that the capacity is of one window's tokens on every backend.
#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <map>

#include "bench/harness/shape_io.h"
#include "model/error.h"
#include "scenarios/backend_factory.h"
#include "scenarios/device.h"
#include "scenarios/expert_load_rows.h"

namespace v3b::scen {
namespace {

struct Rule {
  double factor = 0;  // 0: nothing is dropped
  spec::DropPolicy policy = spec::DropPolicy::slot;
  std::string name() const {
    return factor > 0 ? fmt::format("capacity-{}-{}", factor, bench::field_to_text(policy))
                      : "no-dropping";
  }
};

struct Measured {
  std::map<int64_t, LoadCounter> layers;  // what the router asked for
  std::map<int64_t, int64_t> dropped;     // assignments
  DocumentLoss loss;
};

Measured measure(model::Backend& backend, const std::vector<TextWindow>& windows, size_t docs,
                 Progress& progress) {
  const auto& c = backend.config();
  Measured m{{}, {}, DocumentLoss(docs)};
  for (const auto& w : windows) {
    const auto sequence = backend.new_sequence();
    const auto r =
        backend.forward(*sequence, w.ids, {.logits = model::LogitsOf::all, .routes = true});
    m.loss.add(w, sequence_losses(r, c.vocab_size, w.ids));
    for (const auto& route : r.routes) {
      const auto it = m.layers.try_emplace(route.layer, c.n_routed_experts, c.n_group).first;
      it->second.add(route.idx, route.K);
      it->second.end_batch();
      m.dropped[route.layer] += std::count(route.dropped.begin(), route.dropped.end(), 1);
    }
    progress.advance(static_cast<double>(w.ids.size()));
  }
  return m;
}

}  // namespace

void expert_load_capacity(const ExpertLoadOptions& o, rep::CsvWriter& csv) {
  std::vector<Rule> rules = {{}};
  for (const auto& name : o.drop_policies) {
    spec::DropPolicy policy{};
    if (!bench::field_from_text(name, policy))
      throw Error(ExitCode::usage, "unknown drop policy", "--drop-policies", "slot, token or prob",
                  "'" + name + "'");
    for (const double f : o.capacity_factors) rules.push_back({f, policy});
  }
  const LoadedModel m = load_model(o);
  const auto& c = m.config();
  if (c.n_routed_experts == 0)
    throw Error(ExitCode::bad_input, "model has no experts", m.name, "n_routed_experts > 0", "0");
  const int64_t window = window_length(o, c), K = c.num_experts_per_tok;
  const TokenSet set = load_tokens(o, m, {.min_tokens = window});
  const auto windows = cut_windows(set, window, o.capacity_tokens, 1);
  const auto T = static_cast<int64_t>(windows.size()) * window;
  double bytes = 0;
  for (const auto& w : windows) bytes += static_cast<double>(w.bytes);
  std::vector<bool> biases = {true};
  if (c.topk_method == model::TopkMethod::noaux_tc) biases.push_back(false);

  const auto row = [&](bool bias, const Rule& rule, const std::string& layer) {
    rep::Record r;
    r.set("part", "capacity").set("model", m.name).set("tokens_from", set.name).set("layer", layer);
    r.set("bias", bias ? "on" : "off").set("group_limit", "on").set("routes", rule.name());
    r.set("experts", c.n_routed_experts).set("top_k", K).set("groups", c.n_group);
    r.set("groups_kept", c.topk_group).set("tokens", T).set("impl", o.backend);
    r.set("batch_tokens", window).set("batches", static_cast<int64_t>(windows.size()));
    if (rule.factor > 0)
      r.set("capacity_factor", rule.factor).set("drop_policy", bench::field_to_text(rule.policy));
    return r;
  };
  if (!device_missing(o).empty()) {
    rep::Record all = row(true, {}, "all");
    if (!csv.has(all)) write_row(o, csv, set_device_missing(all, o));
    return;
  }
  bool all_there = true;
  for (const bool bias : biases)
    for (const Rule& rule : rules) all_there &= csv.has(row(bias, rule, "all"));
  if (all_there) return;

  const double floor_batch = maxvio_noise_floor(c.n_routed_experts, K, window, o.seed),
               floor_global = maxvio_noise_floor(c.n_routed_experts, K, T, o.seed);
  Progress progress("expert-load capacity",
                    static_cast<double>(T) * static_cast<double>(biases.size() * rules.size()));
  DocumentLoss base(0);
  for (const bool bias : biases)
    for (const Rule& rule : rules) {
      const bool is_base = bias && rule.factor == 0;  // its losses serve the others' differences
      rep::Record all = row(bias, rule, "all");
      if (csv.has(all) && !is_base) {
        progress.advance(static_cast<double>(T));
        continue;
      }
      progress.show(fmt::format("bias {}, {}", bias ? "on" : "off", rule.name()));
      model::BackendOptions b = backend_options(o);
      b.flags.ignore_selection_bias = !bias;
      b.flags.drop_policy = rule.policy;
      b.capacity_factor = rule.factor;
      const auto backend = make_backend(o.backend, m.weights, b);
      const Measured x = measure(*backend, windows, set.docs.size(), progress);
      if (is_base) base = x.loss;
      double dropped = 0, vio_batch = 0, vio_global = 0, groups = 0;
      const auto pct = [&](double n) { return 100 * n / static_cast<double>(T * K); };
      for (const auto& [layer, counter] : x.layers) {
        rep::Record r = row(bias, rule, std::to_string(layer));
        set_load(r, counter.load());
        r.set("maxvio_batch", counter.maxvio_batch())
            .set("maxvio_batch_max", counter.maxvio_batch_max())
            .set("noise_floor_batch", floor_batch)
            .set("noise_floor_global", floor_global)
            .set("groups_per_token", counter.groups_per_token());
        r.set("dropped_pct", pct(static_cast<double>(x.dropped.at(layer))));
        dropped += static_cast<double>(x.dropped.at(layer));
        vio_batch += counter.maxvio_batch();
        vio_global += ref_max_vio(counter.load());
        groups += counter.groups_per_token();
        if (!csv.has(r)) write_row(o, csv, r.set("status", "ok"));
      }
      const auto layers = static_cast<double>(x.layers.size());
      all.set("maxvio_batch", vio_batch / layers).set("maxvio_global", vio_global / layers);
      all.set("noise_floor_batch", floor_batch).set("noise_floor_global", floor_global);
      all.set("groups_per_token", groups / layers).set("dropped_pct", pct(dropped / layers));
      x.loss.set(all, bytes);
      if (!is_base) x.loss.set_change(all, base, o.seed);
      if (!m.trained) all.set("reason", "random weights");
      if (!csv.has(all)) write_row(o, csv, all.set("status", "ok"));
    }
  progress.finish();
}

}  // namespace v3b::scen
