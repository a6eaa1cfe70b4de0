// The yarn-perplexity scenario: which documents, which variants, what is written. Losses of single
// documents are rows of their own, so that an interrupted run goes on where it stopped and pooled
// figures can be made again.
#include "scenarios/yarn_perplexity.h"

#include <fmt/format.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <filesystem>
#include <map>

#include "bench/harness/flags_text.h"
#include "model/error.h"
#include "model/hash.h"
#include "model/params.h"
#include "reference/perplexity.h"
#include "reports/machine.h"
#include "scenarios/backend_factory.h"
#include "scenarios/device.h"

namespace v3b::scen {
namespace {

const std::vector<std::string> kColumns = {
    "kind", "model", "weights", "backend", "token_set", "finetune_steps", "finetune_contexts",
    "finetune_tokens_per_step", "variant", "factor", "params", "trained_context", "document",
    "domain", "docs", "bin_begin", "bin_end", "scored_tokens", "nll_sum", "mean_nll", "ppl",
    "bits_per_token",
    // paired differences of the mean loss, nats a token
    "vs_none_nll", "vs_none_low", "vs_none_high", "vs_yarn_factor", "vs_yarn_nll", "vs_yarn_low",
    "vs_yarn_high", "vs_untuned_nll", "vs_untuned_low", "vs_untuned_high",
    // sliding windows
    "window", "stride", "windows", "token_mean_ppl", "window_mean_ppl", "seconds", "status",
    "reason"};
const std::vector<std::string> kKeys = {
    "kind",    "weights", "backend",  "token_set", "finetune_steps", "finetune_contexts",
    "variant", "factor",  "document", "bin_begin", "bin_end",        "window",
    "stride"};

template <class T>
void set_default(T& v, const T& quick, const T& full, bool is_full) {
  if (v == T{}) v = is_full ? full : quick;
}

YarnOptions with_defaults(YarnOptions o, int64_t L) {
  using Names = std::vector<std::string>;
  set_default<Names>(o.variants,
                     {"none", "pi", "ntk", "dynamic-ntk", "ntk-by-parts", "yarn-no-temp", "yarn",
                      "yarn-paper-ramp"},
                     context_variant_names(), o.full);
  set_default<std::vector<double>>(o.factors, {8}, {2, 4, 8, 16, 32}, o.full);
  set_default<int64_t>(o.length, 8 * L, 32 * L, o.full);
  set_default<int64_t>(o.docs, 6, 8, o.full);
  set_default<std::vector<int64_t>>(o.windows, {L, 4 * L}, {L, 4 * L, 16 * L}, o.full);
  set_default<Names>(o.window_variants, {"none", "yarn"}, {"none", "pi", "ntk", "yarn"}, o.full);
  set_default<int64_t>(o.window_docs, 2, 4, o.full);
  set_default<int64_t>(o.window_length, o.length, o.length, o.full);
  set_default<std::vector<int64_t>>(o.finetune_contexts, {4 * L, 8 * L}, {4 * L, 8 * L}, o.full);
  set_default<Names>(o.finetune_variants, {"none", "pi", "yarn"}, {"none", "pi", "ntk", "yarn"},
                     o.full);
  if (o.finetune_factor == 0)
    o.finetune_factor = std::max(1.0, static_cast<double>(o.length) / static_cast<double>(L));
  const auto positive = [](int64_t v, const char* flag, int64_t least = 1) {
    if (v < least)
      throw Error(ExitCode::usage, "bad value", flag, fmt::format("{} or more", least),
                  std::to_string(v));
  };
  positive(o.length, "--length");
  positive(o.docs, "--docs");
  positive(o.window_docs, "--window-docs");
  positive(o.chunk, "--chunk");
  positive(o.finetune, "--finetune", 0);
  positive(o.stride, "--stride", 0);
  positive(o.finetune_tokens, "--finetune-tokens");
  for (const int64_t w : o.windows) positive(w, "--windows", 2);
  for (const int64_t c : o.finetune_contexts) positive(c, "--finetune-contexts", 2);
  if (o.window_length > o.length)
    throw Error(ExitCode::usage, "bad value", "--window-length",
                "at most --length " + std::to_string(o.length), std::to_string(o.window_length));
  for (const auto* names : {&o.variants, &o.window_variants, &o.finetune_variants})
    for (const auto& n : *names) (void)context_variant(n, L, 1);  // legal names
  for (const double f : o.factors) (void)context_variant("none", L, f);
  (void)context_variant("none", L, o.finetune_factor);
  return o;
}

std::string text_id(const TokenSet& set) {
  uint64_t h = model::fnv1a64("tokens");
  for (const auto& d : set.docs)
    h = model::fnv1a64(
        {reinterpret_cast<const char*>(d.ids.data()), d.ids.size() * sizeof(int32_t)}, h);
  return model::hex64(h).substr(0, 8);
}

int64_t trained_context(const model::ModelConfig& c) {
  const int64_t original = c.rope_scaling.original_max_position_embeddings;
  return original > 0 ? original : c.max_position_embeddings;
}

// Weights under one variant, and the sums of every document.
struct Cell {
  model::WeightsPtr weights;
  std::string weights_id;
  int64_t finetune_steps = 0;
  ContextVariant variant;
  std::vector<BinSums> docs;
  double seconds = 0;
  bool bad = false;  // a loss was not a number
};

class Run {
 public:
  explicit Run(const YarnOptions& options)
      : model_(load_model(options)),
        L_(trained_context(model_.config())),
        o_(with_defaults(options, L_)),
        bins_(position_bins(L_, o_.length)) {
    if (o_.finetune > 0 && model_.path.empty())
      throw Error(ExitCode::usage, "fine-tuning starts from a checkpoint", "--finetune",
                  "--model with a folder", model_.name);
    if (o_.finetune > 0 && !bench::changed_flags_text(o_.flags).empty())
      throw Error(ExitCode::usage, "training's forward pass takes no flags", "--finetune, --flags",
                  "one of the two", bench::changed_flags_text(o_.flags));
    if (o_.finetune > 0)
      for (const auto& v : o_.finetune_variants)
        check_finetune_variant(context_variant(v, L_, o_.finetune_factor));
    TokenSetOptions t;
    t.max_docs = o_.docs;
    t.min_tokens = t.max_tokens = o_.length + 1;
    set_ = load_tokens(o_, model_, t);
    token_set_ = fmt::format("{}:{}x{}:{}", set_.name, set_.docs.size(), o_.length, text_id(set_));
    weights_id_ = scen::weights_id(*model_.weights);
    const std::string path = o_.out + "/yarn_perplexity.csv";
    std::error_code ec;
    if (o_.resume && std::filesystem::exists(path, ec))
      earlier_ = rep::read_csv(path, {.drop_torn_last_line = true});
    csv_ = open_csv(o_, "yarn_perplexity.csv", kColumns, kKeys);
    if (earlier_)
      for (size_t i = 0; i < earlier_->rows.size(); ++i)
        if (earlier_->cell(i, "kind") == "document") earlier_row_[row_key(earlier_->record(i))] = i;
  }

  // Returns true when every loss was a number.
  bool run() {
    for (const auto& name : o_.variants) {
      if (!context_variant(name, L_, 1).has_factor) {
        add_cell(model_.weights, weights_id_, 0, context_variant(name, L_, 1, o_.flags));
        continue;
      }
      for (const double f : o_.factors)
        add_cell(model_.weights, weights_id_, 0, context_variant(name, L_, f, o_.flags));
    }
    if (!device_missing(o_).empty()) {
      for (const auto& c : cells_) missing(c);
      return true;
    }
    Progress progress("yarn-perplexity", total_work());
    for (auto& c : cells_) measure(c, progress);
    windows(model_.weights, weights_id_, progress);
    progress.finish();
    if (o_.finetune > 0) tuned();
    for (const auto& c : cells_) pool(c);
    return std::none_of(cells_.begin(), cells_.end(), [](const Cell& c) { return c.bad; }) &&
           !window_bad_;
  }
  const rep::CsvWriter& csv() const { return *csv_; }
  const YarnOptions& options() const { return o_; }

 private:
  void add_cell(model::WeightsPtr w, std::string id, int64_t steps, ContextVariant v) {
    Cell c;
    c.weights = std::move(w);
    c.weights_id = std::move(id);
    c.finetune_steps = steps;
    c.variant = std::move(v);
    cells_.push_back(std::move(c));
  }

  std::string contexts_text() const {
    std::string s;
    for (const int64_t c : o_.finetune_contexts) s += (s.empty() ? "" : " ") + std::to_string(c);
    return s;
  }

  rep::Record row(const char* kind, const Cell& c) const {
    rep::Record r;
    r.set("kind", kind).set("model", model_.name).set("weights", c.weights_id);
    r.set("backend", o_.backend).set("token_set", token_set_);
    r.set("finetune_steps", c.finetune_steps);
    if (c.finetune_steps > 0)
      r.set("finetune_contexts", contexts_text())
          .set("finetune_tokens_per_step", o_.finetune_tokens);
    r.set("variant", c.variant.name).set("params", c.variant.params() + ";" + params_text(o_));
    if (c.variant.has_factor) r.set("factor", c.variant.scaling.factor);
    return r.set("trained_context", L_);
  }
  static std::string row_key(const rep::Record& r) {
    std::string k;
    for (const auto& c : kKeys) k += r.text(c) + '\x1f';
    return k;
  }
  static rep::Record& set_loss(rep::Record& r, double nll, double tokens) {
    const double mean = nll / tokens;
    r.set("scored_tokens", static_cast<int64_t>(tokens)).set("nll_sum", nll);
    r.set("mean_nll", mean).set("ppl", std::exp(mean)).set("bits_per_token", mean / std::log(2.0));
    if (!std::isfinite(mean)) return r.set("status", "failed").set("reason", "loss is no number");
    return r.set("status", "ok");
  }

  void missing(const Cell& c) const {  // the device is not here
    auto r = row("bin", c);
    r.set("bin_begin", int64_t{0}).set("bin_end", o_.length);
    if (!csv_->has(r)) csv_->write(set_device_missing(r, o_).set(rep::identity(device_column(o_))));
  }

  // FLOP of one pass over a document, in units of a token's linear layers.
  double work(const ContextVariant& v, double length) const {
    const auto& c = model_.config();
    const double pair = 2.0 * static_cast<double>(c.num_attention_heads) *
                        static_cast<double>(c.qk_head_dim() + c.v_head_dim) *
                        static_cast<double>(c.num_hidden_layers);
    const double token = 2.0 * static_cast<double>(model::count_params(c).active_excl_embedding);
    const auto pass = [&](double n) { return n + n * n / 2 * pair / token; };
    if (!v.dynamic) return pass(length);
    double w = 0;
    for (const auto& b : bins_) w += pass(static_cast<double>(b.end));
    return w;
  }
  double total_work() const {
    double w = 0;
    for (const auto& c : cells_)
      w += work(c.variant, static_cast<double>(o_.length)) * static_cast<double>(set_.docs.size());
    return w;
  }

  void measure(Cell& c, Progress& progress) {
    VariantRunner runner(o_.backend, c.weights, c.variant, o_.length + 1, o_.threads);
    const double each = work(c.variant, static_cast<double>(o_.length));
    for (const auto& d : set_.docs) {
      progress.show(fmt::format("{} x{} {}", c.variant.name, c.variant.scaling.factor, d.id));
      c.docs.push_back({});
      if (take_over(c, d)) {
        progress.advance(each);
        continue;
      }
      const auto start = std::chrono::steady_clock::now();
      c.docs.back() = runner.by_bin(d.ids, bins_, o_.chunk);
      const double s =
          std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
      c.seconds += s;
      for (size_t b = 0; b < bins_.size(); ++b) {
        auto r = document_row(c, d, b);
        set_loss(r, c.docs.back().nll[b], static_cast<double>(c.docs.back().tokens[b]));
        c.bad = c.bad || r.text("status") != "ok";
        if (b + 1 == bins_.size()) r.set("seconds", s);
        if (!csv_->has(r))
          csv_->write(r.set(rep::identity(device_column(o_))));  // a cut-off run left some
      }
      progress.advance(each);
    }
  }
  rep::Record document_row(const Cell& c, const TokenDoc& d, size_t bin) const {
    auto r = row("document", c);
    r.set("document", d.id).set("domain", d.domain);
    return r.set("bin_begin", bins_[bin].begin).set("bin_end", bins_[bin].end);
  }
  // A document's sums from the rows of an earlier run; false unless every bin is there.
  bool take_over(Cell& c, const TokenDoc& d) const {
    BinSums sums;
    for (size_t b = 0; b < bins_.size(); ++b) {
      const auto it = earlier_row_.find(row_key(document_row(c, d, b)));
      if (it == earlier_row_.end()) return false;
      const auto nll = earlier_->number(it->second, "nll_sum");
      if (!nll) return false;
      sums.nll.push_back(*nll);
      sums.tokens.push_back(bins_[b].end - bins_[b].begin);
    }
    c.docs.back() = sums;
    return true;
  }

  // Sums by document over the bins within [begin, end).
  void sums(const Cell& c, PositionBin range, std::vector<double>& nll,
            std::vector<double>& tokens) const {
    nll.assign(c.docs.size(), 0);
    tokens.assign(c.docs.size(), 0);
    for (size_t d = 0; d < c.docs.size(); ++d)
      for (size_t b = 0; b < bins_.size(); ++b)
        if (bins_[b].begin >= range.begin && bins_[b].end <= range.end) {
          nll[d] += c.docs[d].nll[b];
          tokens[d] += static_cast<double>(c.docs[d].tokens[b]);
        }
  }
  const Cell* find(const std::string& variant, int64_t steps, double factor) const {
    for (const auto& c : cells_)
      if (c.variant.name == variant && c.finetune_steps == steps &&
          (!c.variant.has_factor || c.variant.scaling.factor == factor))
        return &c;
    return nullptr;
  }
  // YaRN with the variant's own factor; without one, the smallest factor that covers the length.
  const Cell* yarn_for(const Cell& c) const {
    if (c.variant.has_factor) return find("yarn", c.finetune_steps, c.variant.scaling.factor);
    const double need = static_cast<double>(o_.length) / static_cast<double>(L_);
    const Cell* best = nullptr;
    for (const auto& y : cells_) {
      if (y.variant.name != "yarn" || y.finetune_steps != c.finetune_steps) continue;
      const double f = y.variant.scaling.factor, b = best ? best->variant.scaling.factor : 0;
      if (!best || (b < need ? f > b : f >= need && f < b)) best = &y;
    }
    return best;
  }
  void set_difference(rep::Record& r, const std::string& name, const Cell& c, const Cell* base,
                      PositionBin range) const {
    if (base == nullptr || base == &c || base->docs.size() != c.docs.size()) return;
    std::vector<double> a, b, n, m;
    sums(c, range, a, n);
    sums(*base, range, b, m);
    for (size_t i = 0; i < a.size(); ++i) a[i] -= b[i];
    const auto d = bootstrap_ratio(a, n, o_.seed);
    r.set("vs_" + name + "_nll", d.mean);
    r.set("vs_" + name + "_low", d.interval.low).set("vs_" + name + "_high", d.interval.high);
  }

  void pool(const Cell& c) const {
    std::vector<PositionBin> ranges = bins_;
    if (o_.length > L_) ranges.push_back({L_, o_.length});
    ranges.push_back({0, o_.length});
    for (const auto& range : ranges) {
      auto r = row("bin", c);
      r.set("docs", static_cast<int64_t>(c.docs.size()));
      r.set("bin_begin", range.begin).set("bin_end", range.end);
      if (csv_->has(r)) continue;
      std::vector<double> nll, tokens;
      sums(c, range, nll, tokens);
      double a = 0, n = 0;
      for (size_t d = 0; d < nll.size(); ++d) a += nll[d], n += tokens[d];
      set_loss(r, a, n);
      set_difference(r, "none", c, find("none", c.finetune_steps, 1), range);
      if (const Cell* y = yarn_for(c); y != nullptr && y != &c) {
        set_difference(r, "yarn", c, y, range);
        r.set("vs_yarn_factor", y->variant.scaling.factor);
      }
      if (c.finetune_steps > 0)
        set_difference(r, "untuned", c, find(c.variant.name, 0, c.variant.scaling.factor), range);
      if (c.seconds > 0 && range.begin == 0 && range.end == o_.length) r.set("seconds", c.seconds);
      csv_->write(r.set(rep::identity(device_column(o_))));
    }
  }

  void windows(const model::WeightsPtr& w, const std::string& id, Progress& progress) {
    const auto docs = std::min<size_t>(set_.docs.size(), static_cast<size_t>(o_.window_docs));
    const int64_t N = o_.window_length;
    for (const int64_t seen : o_.windows) {
      if (seen > N + 1) continue;  // bos and all of the text are one window
      const int64_t W = seen - 1, S = o_.stride > 0 ? o_.stride : std::max<int64_t>(1, seen / 2);
      for (const auto& name : o_.window_variants) {
        if (seen <= L_ && name != "none") continue;  // s = 1: all are the same
        Cell c;
        c.weights = w;
        c.weights_id = id;
        // The factor that just covers the window.
        const double factor = std::max(1.0, static_cast<double>(seen) / static_cast<double>(L_));
        c.variant = context_variant(name, L_, factor, o_.flags);
        auto r = row("window", c);
        r.set("docs", static_cast<int64_t>(docs)).set("bin_begin", int64_t{0}).set("bin_end", N);
        r.set("window", seen).set("stride", S);
        if (csv_->has(r)) continue;
        progress.show(fmt::format("windows of {}, {}", seen, name));
        const auto start = std::chrono::steady_clock::now();
        VariantRunner runner(o_.backend, w, c.variant, seen + 1, o_.threads);
        double nll = 0, means = 0;
        int64_t tokens = 0, count = 0;
        for (size_t d = 0; d < docs; ++d) {
          const auto& ids = set_.docs[d].ids;  // ids[0] is bos; text token j stands at j + 1
          const auto p = ref::sliding_perplexity(N, W, S, [&](int64_t b, int64_t e) {
            std::vector<int32_t> part = {ids[0]};
            part.insert(part.end(), ids.begin() + b + 1, ids.begin() + e + 1);
            return runner.losses(part, 0, e - b, seen, o_.chunk);
          });
          nll += p.nll_sum;
          tokens += p.tokens;
          means += p.window_mean_nll * static_cast<double>(p.windows);
          count += p.windows;
        }
        set_loss(r, nll, static_cast<double>(tokens)).set("windows", count);
        r.set("token_mean_ppl", std::exp(nll / static_cast<double>(tokens)));
        r.set("window_mean_ppl", std::exp(means / static_cast<double>(count)));
        r.set("seconds",
              std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count());
        window_bad_ = window_bad_ || r.text("status") != "ok";
        csv_->write(r.set(rep::identity(device_column(o_))));
      }
    }
  }

  void tuned() {
    const size_t first = cells_.size();
    for (const auto& name : o_.finetune_variants) {
      const auto v = context_variant(name, L_, o_.finetune_factor);
      const std::string dir = finetune_variant(o_, model_.path, v, o_.out + "/yarn_finetune");
      const auto w = model::load_weights(dir);
      add_cell(w, weights_id(*w), o_.finetune, v);
      if (find(name, 0, v.scaling.factor) == nullptr)  // what it was before
        add_cell(model_.weights, weights_id_, 0, v);
    }
    double work_left = 0;
    for (size_t i = first; i < cells_.size(); ++i)
      work_left += work(cells_[i].variant, static_cast<double>(o_.length)) *
                   static_cast<double>(set_.docs.size());
    Progress progress("yarn-perplexity, fine-tuned", work_left);
    for (size_t i = first; i < cells_.size(); ++i) measure(cells_[i], progress);
    progress.finish();
  }

  LoadedModel model_;
  int64_t L_;
  const YarnOptions o_;
  std::vector<PositionBin> bins_;
  TokenSet set_;
  std::string token_set_, weights_id_;
  std::optional<rep::CsvTable> earlier_;
  std::map<std::string, size_t> earlier_row_;
  std::unique_ptr<rep::CsvWriter> csv_;
  std::vector<Cell> cells_;
  bool window_bad_ = false;
};

}  // namespace

int run_yarn_perplexity(const YarnOptions& options) {
  Run run(options);
  const bool good = run.run();
  rep::write_machine_json(options.out);
  if (options.print_table) print_table(run.csv());
  finish_device(options);
  return static_cast<int>(good ? ExitCode::ok : ExitCode::check_failed);
}

}  // namespace v3b::scen
