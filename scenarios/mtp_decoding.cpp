// The mtp-decoding scenario: prompts, plain and speculative decoding in turns, rows. Rows of single
// prompts are what a resumed run takes over; pooled rows are made of them at the end.
#include "scenarios/mtp_decoding.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <filesystem>
#include <map>
#include <set>

#include "bench/harness/shape_io.h"
#include "model/error.h"
#include "model/hash.h"
#include "model/mtp_support.h"
#include "reference/speculative.h"
#include "reports/machine.h"
#include "scenarios/backend_factory.h"
#include "scenarios/decode_loop.h"
#include "scenarios/device.h"
#include "scenarios/device_decode.h"

namespace v3b::scen {
namespace {

template <class T>
void set_default(T& v, const T& quick, const T& full, bool is_full) {
  if (v == T{}) v = is_full ? full : quick;
}

MtpOptions with_defaults(MtpOptions o) {
  set_default<std::vector<int64_t>>(o.drafts, {1, 3}, {1, 2, 3, 4}, o.full);
  set_default<std::vector<double>>(o.temperatures, {0.7}, {0.5, 0.7, 1}, o.full);
  set_default<int64_t>(o.prompts, 6, 24, o.full);
  set_default<int64_t>(o.prompt_tokens, 96, 128, o.full);
  set_default<int64_t>(o.max_new, 64, 256, o.full);
  set_default<std::vector<double>>(o.forced, {0, 0.5, 0.85, 0.9, 1},
                                   {0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95, 1},
                                   o.full);
  set_default<int64_t>(o.forced_prompts, 8, 16, o.full);
  set_default<int64_t>(o.text_tokens, 2048, 32768, o.full);
  const auto positive = [](int64_t v, const char* flag) {
    if (v < 1) throw Error(ExitCode::usage, "bad value", flag, "1 or more", std::to_string(v));
  };
  positive(o.prompts, "--prompts");
  positive(o.prompt_tokens, "--prompt-tokens");
  positive(o.max_new, "--max-new");
  positive(o.forced_prompts, "--forced-prompts");
  positive(o.text_tokens, "--text-tokens");
  for (const int64_t d : o.drafts) positive(d, "--drafts");
  for (const double t : o.temperatures)
    if (!(t > 0 && std::isfinite(t)))
      throw Error(ExitCode::usage, "bad temperature", "--temperatures", "more than 0",
                  fmt::format("{}", t));
  if (!(o.top_p > 0 && o.top_p <= 1))
    throw Error(ExitCode::usage, "bad value", "--top-p", "more than 0, at most 1",
                fmt::format("{}", o.top_p));
  for (const double f : o.forced)
    if (!(f >= 0 && f <= 1))
      throw Error(ExitCode::usage, "bad acceptance", "--forced", "0 to 1", fmt::format("{}", f));
  return o;
}

struct Prompt {
  std::string domain, document;
  int64_t index = 0;
  std::vector<int32_t> ids;
};

// How tokens are chosen.
struct Mode {
  bool greedy = true;
  double temperature = 0;
};

class Run {
 public:
  explicit Run(const MtpOptions& options) : o_(with_defaults(options)), model_(load_model(o_)) {
    const auto& c = model_.config();
    if (c.num_nextn_predict_layers < 1)
      throw Error(ExitCode::bad_input, "the model has no MTP module", model_.name,
                  "num_nextn_predict_layers of 1", "0");
    model::check_single_mtp(c, model_.name);
    const int64_t most = *std::max_element(o_.drafts.begin(), o_.drafts.end());
    if (o_.prompt_tokens + o_.max_new + most > c.max_position_embeddings)
      throw Error(ExitCode::usage, "prompt and continuation do not fit the context",
                  "--prompt-tokens, --max-new",
                  fmt::format("together at most {} (context {} less {} drafts)",
                              c.max_position_embeddings - most, c.max_position_embeddings, most),
                  std::to_string(o_.prompt_tokens + o_.max_new));
    make_prompts();
    weights_id_ = weights_id(*model_.weights);
    const std::string path = o_.out + "/mtp_decoding.csv";
    std::error_code ec;
    if (o_.resume && std::filesystem::exists(path, ec)) {
      earlier_ = rep::read_csv(path, {.drop_torn_last_line = true});
      for (size_t i = 0; i < earlier_->rows.size(); ++i)
        earlier_row_[row_key(earlier_->record(i))] = i;
    }
    csv_ = open_csv(o_, "mtp_decoding.csv", kMtpColumns, kMtpKeys);
    modes_ = {{true, 0}};
    if (!device_missing(o_).empty()) return;
    if (on_cuda(o_)) {  // what the device's own loop has; the rest is rows with a reason
      std::erase_if(drafts_, [](int64_t d) { return d > 1; });
      forced_now_.clear();
    } else {
      for (const double t : o_.temperatures) modes_.push_back({false, t});
    }
    backend_ = make_backend(o_.backend, model_.weights, backend_options(o_));
  }

  // Returns true when speculation never changed what is emitted.
  bool run() {
    if (!device_missing(o_).empty()) {
      auto r = summary_row({}, o_.drafts[0], -1);
      write(set_device_missing(r, o_));
      return true;
    }
    if (on_cuda(o_)) refused();
    const auto forced =
        forced_now_.empty()
            ? size_t{0}
            : std::min<size_t>(prompts_.size(), static_cast<size_t>(o_.forced_prompts));
    Progress progress("mtp-decoding",
                      static_cast<double>(modes_.size() * prompts_.size() * (drafts_.size() + 1) +
                                          forced * (o_.forced.size() + 2)));
    warm_up();
    for (const Mode& m : modes_)
      for (const auto& p : prompts_) {
        progress.show(fmt::format("{} {}", m.greedy ? "greedy" : "sampled", p.document));
        decode_prompt(m, p);
        progress.advance(static_cast<double>(drafts_.size() + 1));
      }
    for (size_t i = 0; i < forced; ++i) {  // spread over the domains
      const auto& p = prompts_[i * prompts_.size() / forced];
      progress.show(fmt::format("forced acceptance, {}", p.document));
      force_prompt(p, static_cast<int64_t>(i));
      progress.advance(static_cast<double>(o_.forced.size() + 2));
    }
    progress.finish();
    for (const auto& d : domains_) text_rows(d);
    pooled();
    return mismatches_ == 0;
  }
  const rep::CsvWriter& csv() const { return *csv_; }

 private:
  // Windows from the middle of held-out documents, bos in front, the same number of each domain.
  void make_prompts() {
    uint64_t h = model::fnv1a64("prompts");
    std::string name;
    for (const char* domain : {"prose", "code"}) {
      TokenSetOptions t;
      t.domain = o_.text.empty() ? domain : "";
      t.min_tokens = o_.prompt_tokens + 1;
      const TokenSet set = load_tokens(o_, model_, t);
      name = o_.text.empty() ? t.split : set.name;
      const auto n = static_cast<int64_t>(set.docs.size());
      for (int64_t i = 0; i < o_.prompts; ++i) {
        const auto& d = set.docs[static_cast<size_t>(n >= o_.prompts ? i * n / o_.prompts : i % n)];
        const int64_t room = static_cast<int64_t>(d.ids.size()) - o_.prompt_tokens;
        const int64_t from = 1 + room * (i + 1) / (o_.prompts + 1);
        Prompt p{d.domain, d.id, i, {d.ids[0]}};
        p.ids.insert(p.ids.end(), d.ids.begin() + std::min(from, room),
                     d.ids.begin() + std::min(from, room) + o_.prompt_tokens - 1);
        h = model::fnv1a64({reinterpret_cast<const char*>(p.ids.data()), p.ids.size() * 4}, h);
        if (std::find(domains_.begin(), domains_.end(), d.domain) == domains_.end())
          domains_.push_back(d.domain);
        prompts_.push_back(std::move(p));
      }
      texts_[domains_.back()] = set;
      if (!o_.text.empty()) break;
    }
    prompt_set_ = fmt::format("{}:{}:{}", name, prompts_.size(), model::hex64(h).substr(0, 8));
  }

  DecodeOptions options(const Mode& m, int64_t drafts, const Prompt& p) const {
    DecodeOptions d;
    d.max_new = o_.max_new;
    d.drafts = drafts;
    d.greedy = m.greedy;
    if (!m.greedy) d.temperature = m.temperature, d.top_p = o_.top_p;
    d.seed = o_.seed * 1000003 + static_cast<uint64_t>(p.index);
    return d;
  }

  void warm_up() {  // buffers grow and pages are touched before anything is timed
    const int64_t most = drafts_.empty() ? 0 : *std::max_element(drafts_.begin(), drafts_.end());
    (void)decode_with({}, most, prompts_[0]);
    (void)decode_with({}, 0, prompts_[0]);
  }
  DecodeResult decode_with(const Mode& m, int64_t drafts, const Prompt& p) {
    return on_cuda(o_) ? device_decode(*backend_, p.ids, o_.max_new, drafts)
                       : decode(*backend_, p.ids, options(m, drafts, p));
  }

  // Rows of what the device's loop does not do.
  void refused() {
    const auto write_refused = [&](const Mode& m, int64_t drafts, double forced) {
      auto r = summary_row(m, drafts, forced);
      r.set("status", "unsupported");
      write(r.set("reason", "the device's decode loop is greedy, with at most one draft a step"));
    };
    for (const int64_t d : o_.drafts)
      if (d > 1) write_refused({}, d, -1);
    for (const double t : o_.temperatures)
      for (const int64_t d : o_.drafts) write_refused({false, t}, d, -1);
    for (const double f : o_.forced) write_refused({}, 1, f);
  }
  rep::Record summary_row(const Mode& m, int64_t drafts, double forced) const {
    auto r = row("summary", m, drafts).set("domain", "all");
    return forced >= 0 ? r.set("forced_acceptance", forced) : r;
  }
  void write(rep::Record& r) {
    if (!csv_->has(r)) csv_->write(r.set(rep::identity(device_column(o_))));
  }

  rep::Record row(const char* kind, const Mode& m, int64_t drafts) const {
    rep::Record r;
    r.set("kind", kind).set("model", model_.name).set("weights", weights_id_);
    r.set("backend", o_.backend).set("prompt_set", prompt_set_);
    r.set("prompt_tokens", o_.prompt_tokens).set("max_new", o_.max_new);
    r.set("decoding", m.greedy ? "greedy" : "sampled");
    if (!m.greedy) r.set("temperature", m.temperature).set("top_p", o_.top_p);
    if (drafts > 0) r.set("drafts", drafts);
    return r.set("params",
                 fmt::format("{};mtp_hidden={};mtp_concat={};recycle={};stop_at_eos={}",
                             params_text(o_), bench::field_to_text(o_.flags.mtp_hidden),
                             bench::field_to_text(o_.flags.mtp_concat),
                             bench::field_to_text(o_.flags.mtp_hidden), on_cuda(o_) ? 0 : 1));
  }
  static std::string row_key(const rep::Record& r) {
    std::string k;
    for (const auto& c : kMtpKeys) k += r.text(c) + '\x1f';
    return k;
  }

  MtpPrompt paired(const Prompt& p, const DecodeResult& plain, const DecodeResult& spec,
                   bool greedy) const {
    const auto us = [](const std::vector<double>& s) { return s.empty() ? 0 : median(s) * 1e6; };
    const auto sum = [](const std::vector<double>& s) {
      double t = 0;
      for (const double x : s) t += x;
      return t;
    };
    MtpPrompt r;
    r.domain = p.domain, r.document = p.document, r.prompt = p.index;
    r.drafted = spec.stats.drafted, r.accepted = spec.stats.accepted;
    r.plain_emitted = plain.stats.emitted, r.emitted = spec.stats.emitted;
    r.steps = spec.stats.steps;
    r.plain_s = sum(plain.stats.step_s), r.s = sum(spec.stats.step_s);
    r.base_us = us(plain.stats.verify_s);
    // The last step does not draft: it would pull the median of short runs down.
    auto draft = spec.stats.draft_s;
    std::erase_if(draft, [](double s) { return s == 0; });
    r.verify_us = us(spec.stats.verify_s), r.draft_us = us(draft);
    r.prefill_us = plain.stats.prefill_s * 1e6, r.mtp_prefill_us = spec.stats.mtp_prefill_s * 1e6;
    r.distinct = static_cast<int64_t>(std::set(spec.tokens.begin(), spec.tokens.end()).size());
    if (!greedy) return r;
    r.first_diff = first_difference(plain.tokens, spec.tokens);
    if (r.first_diff >= 0)
      r.diff_margin = r.first_diff < static_cast<int64_t>(plain.margins.size())
                          ? plain.margins[static_cast<size_t>(r.first_diff)]
                          : std::nan("");
    return r;
  }

  rep::Record prompt_row(const Mode& m, int64_t drafts, const Prompt& p) const {
    auto r = row("prompt", m, drafts);
    return r.set("domain", p.domain).set("document", p.document).set("prompt", p.index);
  }

  // Plain and every number of drafts on one prompt; who begins changes from prompt to prompt.
  void decode_prompt(const Mode& m, const Prompt& p) {
    const auto n = drafts_.size();
    std::vector<size_t> known;
    for (const int64_t d : drafts_) {
      const auto it = earlier_row_.find(row_key(prompt_row(m, d, p)));
      if (it != earlier_row_.end()) known.push_back(it->second);
    }
    const auto keep = [&](int64_t d, MtpPrompt r) {
      mismatches_ += r.mismatch();
      results_[{m.greedy ? 0 : m.temperature, d}].push_back(std::move(r));
    };
    if (known.size() == n) {
      for (size_t i = 0; i < n; ++i) keep(drafts_[i], mtp_prompt_from_row(*earlier_, known[i]));
      return;
    }
    DecodeResult plain;
    std::vector<DecodeResult> spec(n);
    for (size_t k = 0; k <= n; ++k) {
      const size_t who = (k + static_cast<size_t>(p.index)) % (n + 1);
      auto& result = who == 0 ? plain : spec[who - 1];
      result = decode_with(m, who == 0 ? 0 : drafts_[who - 1], p);
    }
    for (size_t i = 0; i < n; ++i) {
      MtpPrompt r = paired(p, plain, spec[i], m.greedy);
      if (on_cuda(o_) && r.first_diff >= 0)
        r.diff_margin = margin_at(*backend_, p.ids, plain.tokens, r.first_diff);
      auto out = prompt_row(m, drafts_[i], p).set("status", "ok");
      set_mtp_prompt(out, r);
      if (m.greedy) set_mtp_identity(out, r);
      write(out);
      keep(drafts_[i], std::move(r));
    }
  }

  // One draft a step that is right with the given probability.
  void force_prompt(const Prompt& p, int64_t turn) {
    const auto forced_row = [&](double f) {
      return prompt_row({}, 1, p).set("forced_acceptance", f);
    };
    std::vector<size_t> known;
    for (const double f : o_.forced) {
      const auto it = earlier_row_.find(row_key(forced_row(f)));
      if (it != earlier_row_.end()) known.push_back(it->second);
    }
    const auto n = o_.forced.size();
    if (known.size() == n) {
      for (size_t i = 0; i < n; ++i)
        forced_[o_.forced[i]].push_back(mtp_prompt_from_row(*earlier_, known[i]));
      return;
    }
    const DecodeResult oracle = decode(*backend_, p.ids, options({}, 0, p));
    DecodeResult plain;
    std::vector<DecodeResult> spec(n);
    for (size_t k = 0; k <= n; ++k) {
      const size_t who = (k + static_cast<size_t>(turn)) % (n + 1);
      if (who == 0) {
        plain = decode(*backend_, p.ids, options({}, 0, p));
        continue;
      }
      DecodeOptions d = options({}, 1, p);
      d.forced_acceptance = o_.forced[who - 1];
      d.oracle = oracle.tokens;
      spec[who - 1] = decode(*backend_, p.ids, d);
    }
    for (size_t i = 0; i < n; ++i) {
      MtpPrompt r = paired(p, plain, spec[i], true);
      mismatches_ += r.mismatch();
      auto out = forced_row(o_.forced[i]).set("status", "ok");
      set_mtp_prompt(out, r);
      set_mtp_identity(out, r);
      write(out);
      forced_[o_.forced[i]].push_back(std::move(r));
    }
  }

  // The first draft after held-out text itself, where the model cannot run into a loop: how often
  // it is the model's own choice, and the chance sum(min(p, q)) of sampling.
  void text_rows(const std::string& domain) {
    std::vector<Mode> modes = {{true, 0}};
    for (const double t : o_.temperatures) modes.push_back({false, t});
    std::vector<rep::Record> rows;
    for (const Mode& m : modes) {
      rows.push_back(row("text", m, 1));
      rows.back().set("domain", domain).set("position", int64_t{1});
    }
    if (std::all_of(rows.begin(), rows.end(), [&](const auto& r) { return csv_->has(r); })) return;
    const int64_t V = model_.config().vocab_size, d = model_.config().hidden_size;
    const int64_t window = std::min<int64_t>(model_.config().max_position_embeddings, 512);
    std::vector<double> beta(modes.size());
    int64_t same = 0, count = 0;
    for (const auto& doc : texts_.at(domain).docs) {
      if (count >= o_.text_tokens) break;
      const int64_t T = std::min<int64_t>(window, static_cast<int64_t>(doc.ids.size()));
      if (T < 3) continue;
      const auto ids = std::span(doc.ids).first(static_cast<size_t>(T));
      const auto sequence = backend_->new_sequence();
      model::ForwardOptions all;
      all.logits = model::LogitsOf::all;
      all.hidden = true;
      const auto main = backend_->forward(*sequence, ids, all);
      const auto mtp = backend_->mtp_forward(
          *sequence, ids.subspan(1), std::span(main.hidden).first(static_cast<size_t>((T - 1) * d)),
          all);
      // Row i of the module has seen ids[0..i+1], as row i+1 of the model has.
      for (int64_t i = 0; i + 1 < T && count < o_.text_tokens; ++i, ++count) {
        const std::span q(mtp.logits.data() + i * V, static_cast<size_t>(V));
        const std::span p(main.logits.data() + (i + 1) * V, static_cast<size_t>(V));
        same += ref::argmax(p) == ref::argmax(q);
        for (size_t m = 1; m < modes.size(); ++m)
          beta[m] +=
              ref::acceptance_rate(ref::sampling_distribution(p, modes[m].temperature, o_.top_p),
                                   ref::sampling_distribution(q, modes[m].temperature, o_.top_p));
      }
    }
    const auto interval = wilson(same, count);
    for (size_t m = 0; m < modes.size(); ++m) {
      auto& r = rows[m];
      r.set("drafted", count);
      if (modes[m].greedy) {
        r.set("accepted", same)
            .set("acceptance", static_cast<double>(same) / static_cast<double>(count));
        r.set("acceptance_low", interval.low).set("acceptance_high", interval.high);
      } else {
        r.set("expected_acceptance", beta[m] / static_cast<double>(count));
      }
      write(r.set("status", "ok"));
    }
  }

  void pooled() {
    for (const auto& [key, all] : results_) {
      const Mode m{key.first == 0, key.first};
      for (const auto& domain : domains_and_all()) pool(m, key.second, domain, all, -1);
    }
    // After a near-tie flip the oracle's text is no longer what is emitted, so that its drafts
    // cannot be right: such prompts stay rows of their own.
    for (const auto& [forced, all] : forced_) {
      std::vector<MtpPrompt> followed;
      for (const auto& p : all)
        if (p.first_diff < 0) followed.push_back(p);
      pool({}, 1, "all", followed, forced);
    }
  }
  std::vector<std::string> domains_and_all() const {
    auto d = domains_;
    if (d.size() > 1) d.push_back("all");
    return d;
  }
  void pool(const Mode& m, int64_t drafts, const std::string& domain,
            const std::vector<MtpPrompt>& all, double forced) {
    std::vector<const MtpPrompt*> part;
    for (const auto& p : all)
      if (domain == "all" || p.domain == domain) part.push_back(&p);
    if (part.empty()) return;
    const MtpSummary s = summarize_mtp(part);
    const auto base = [&](const char* kind) {
      auto r = row(kind, m, drafts);
      if (forced >= 0) r.set("forced_acceptance", forced);
      return r.set("domain", domain).set("prompts", s.prompts);
    };
    for (size_t k = 0; k < s.drafted.size(); ++k) {
      auto r = base("position");
      r.set("position", static_cast<int64_t>(k + 1));
      r.set("drafted", s.drafted[k]).set("accepted", s.accepted[k]);
      if (s.drafted[k] > 0) {
        const auto i = wilson(s.accepted[k], s.drafted[k]);
        r.set("acceptance", static_cast<double>(s.accepted[k]) / static_cast<double>(s.drafted[k]));
        r.set("acceptance_low", i.low).set("acceptance_high", i.high);
      }
      write(r.set("status", "ok"));
    }
    auto r = base("summary");
    r.set("steps", s.steps).set("emitted", s.emitted).set("tokens_per_step", s.tokens_per_step);
    r.set("distinct_share", s.distinct_share);
    r.set("plain_q1_tokens_s", s.plain_q1).set("plain_median_tokens_s", s.plain_median);
    r.set("plain_q3_tokens_s", s.plain_q3).set("speculative_q1_tokens_s", s.q1);
    r.set("speculative_median_tokens_s", s.median).set("speculative_q3_tokens_s", s.q3);
    r.set("base_us", s.base_us).set("verify_us", s.verify_us).set("draft_us", s.draft_us);
    r.set("prefill_us", s.prefill_us).set("mtp_prefill_us", s.mtp_prefill_us);
    r.set("verify_over_base", s.r_v).set("draft_over_base", s.r_d);
    r.set("predicted_speedup", s.predicted).set("measured_speedup", s.measured);
    r.set("break_even_acceptance", s.break_even).set("status", "ok");
    if (m.greedy) {
      r.set("identical_prompts", s.identical).set("near_ties", s.near_ties);
      r.set("mismatches", s.mismatches);
      if (s.mismatches > 0)
        r.set("status", "failed").set("reason", "other tokens than plain decoding");
    }
    write(r);
  }

  const MtpOptions o_;
  LoadedModel model_;
  std::vector<Prompt> prompts_;
  std::vector<std::string> domains_;
  std::map<std::string, TokenSet> texts_;
  std::string prompt_set_, weights_id_;
  std::vector<Mode> modes_;                  // of decoding
  std::vector<int64_t> drafts_ = o_.drafts;  // numbers of drafts that are decoded with
  std::vector<double> forced_now_ = o_.forced;
  std::optional<rep::CsvTable> earlier_;
  std::map<std::string, size_t> earlier_row_;
  std::unique_ptr<rep::CsvWriter> csv_;
  std::unique_ptr<model::Backend> backend_;
  std::map<std::pair<double, int64_t>, std::vector<MtpPrompt>>
      results_;  // temperature (0: greedy), drafts
  std::map<double, std::vector<MtpPrompt>> forced_;
  int64_t mismatches_ = 0;
};

}  // namespace

int run_mtp_decoding(const MtpOptions& options) {
  Run run(options);
  const bool good = run.run();
  rep::write_machine_json(options.out);
  if (options.print_table) print_table(run.csv());
  finish_device(options);
  return static_cast<int>(good ? ExitCode::ok : ExitCode::check_failed);
}

}  // namespace v3b::scen
