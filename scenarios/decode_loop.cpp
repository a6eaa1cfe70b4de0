#include "scenarios/decode_loop.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <stdexcept>

#include "model/error.h"
#include "model/mtp_support.h"
#include "model/rng.h"
#include "reference/speculative.h"

namespace v3b::scen {
namespace {

using Clock = std::chrono::steady_clock;
using model::ForwardOptions;
using model::ForwardResult;
using model::LogitsOf;

double seconds_since(Clock::time_point t0) {
  return std::chrono::duration<double>(Clock::now() - t0).count();
}

// Random numbers that depend on the position in the sequence alone, so that runs repeat.
enum Stream : uint64_t { kEmit = 1, kDraft = 2, kTest = 3, kOracle = 4 };

}  // namespace

float margin_of(std::span<const float> row) {
  float best = -INFINITY, second = -INFINITY;
  double ms = 0;
  for (float v : row) {
    ms += double(v) * v;
    if (v > best) {
      second = best;
      best = v;
    } else if (v > second) {
      second = v;
    }
  }
  return static_cast<float>((best - second) / std::sqrt(ms / double(row.size())));
}

struct DecodeSession::Impl {
  Impl(model::Backend& b, std::span<const int32_t> prompt, const DecodeOptions& opt)
      : backend(b), o(opt), V(b.config().vocab_size), d(b.config().hidden_size) {
    check(prompt);
    prompt_length = static_cast<int64_t>(prompt.size());
    stats.drafted.assign(size_t(o.drafts), 0);
    stats.accepted.assign(size_t(o.drafts), 0);
    seq = backend.new_sequence();
    auto t0 = Clock::now();
    const ForwardResult r = backend.forward(*seq, prompt, {LogitsOf::last, o.drafts > 0});
    const int32_t x =
        o.greedy ? ref::argmax(row(r.logits, 0)) : draw(distribution(row(r.logits, 0)), kEmit, 0);
    stats.prefill_s = seconds_since(t0);
    emit(x, row(r.logits, 0));
    if (finished || o.drafts == 0) return;
    t0 = Clock::now();
    std::vector<int32_t> next(prompt.begin() + 1, prompt.end());
    next.push_back(x);
    draft_chain(next, r.hidden);
    stats.mtp_prefill_s = seconds_since(t0);
    check_invariants();
  }

  void check(std::span<const int32_t> prompt) const {
    if (prompt.empty())
      throw Error(ExitCode::bad_input, "nothing to continue", "prompt", "at least one token");
    if (o.max_new < 1)
      throw Error(ExitCode::usage, "nothing to emit", "max_new", ">= 1", std::to_string(o.max_new));
    if (o.drafts < 0)
      throw Error(ExitCode::usage, "bad number of drafts", "drafts", ">= 0",
                  std::to_string(o.drafts));
    if (!o.greedy && !(o.temperature > 0 && o.top_p > 0 && o.top_p <= 1))
      throw Error(ExitCode::usage, "bad sampling parameters", "temperature, top-p",
                  "temperature > 0, 0 < top-p <= 1");
    if (o.forced_acceptance >= 0 && (!o.greedy || o.oracle.empty()))
      throw Error(ExitCode::usage,
                  "forced acceptance needs greedy decoding and the plain continuation", "decode");
    if (o.drafts > 0 && backend.config().num_nextn_predict_layers < 1)
      throw Error(ExitCode::usage, "speculative decoding needs an MTP module", backend.name());
    if (o.drafts > 0) model::check_single_mtp(backend.config(), backend.name());
  }

  std::span<const float> row(const std::vector<float>& m, int64_t r) const {
    return {m.data() + r * V, static_cast<size_t>(V)};
  }
  std::vector<double> distribution(std::span<const float> logits) const {
    return ref::sampling_distribution(logits, o.temperature, o.top_p);
  }
  double uniform(Stream s, int64_t k) const {
    return model::rng_uniform({o.seed, s}, uint64_t(tokens.size()) * 64 + uint64_t(k));
  }
  int32_t draw(const std::vector<double>& p, Stream s, int64_t k) const {
    return ref::sample(p, uniform(s, k));
  }

  // Appends one token and decides whether decoding ends with it.
  void emit(int32_t token, std::span<const float> logits) {
    tokens.push_back(token);
    margins.push_back(margin_of(logits));
    if (o.stop_at_eos && token == backend.config().eos_token_id) finished = true;
    if (static_cast<int64_t>(tokens.size()) >= o.max_new) finished = true;
    if (o.forced_acceptance >= 0 && tokens.size() >= o.oracle.size()) finished = true;
    const int64_t room = backend.config().max_position_embeddings;
    if (prompt_length + static_cast<int64_t>(tokens.size()) > room)
      finished = true;  // no position for it
  }

  // MTP rows (next[j], hidden row j); the last one drafts, its recycled state drafts further
  // tokens.
  void draft_chain(std::span<const int32_t> next, std::span<const float> hidden) {
    drafts.clear();
    draft_p.clear();
    const ForwardOptions last{LogitsOf::last, true};
    const int64_t keep = seq->mtp_length() + static_cast<int64_t>(next.size());
    ForwardResult r = backend.mtp_forward(*seq, next, hidden, last);
    const int64_t room = backend.config().max_position_embeddings - keep - 1;
    const int64_t gamma = std::min(o.drafts, room);
    for (int64_t k = 0; k < gamma; ++k) {
      if (k > 0) {
        const std::vector<float> state(r.hidden.end() - d, r.hidden.end());
        r = backend.mtp_forward(*seq, std::span(&drafts.back(), 1), state, last);
      }
      drafts.push_back(pick_draft(row(r.logits, 0), k));
    }
    seq->mtp_truncate(keep);  // rows of unverified tokens go; the true ones come after verification
  }

  int32_t pick_draft(std::span<const float> logits, int64_t k) {
    if (o.greedy) {
      draft_p.emplace_back();
      const int32_t own = ref::argmax(logits);
      if (o.forced_acceptance < 0) return own;
      const size_t at = tokens.size() + size_t(k);
      const int32_t truth = at < o.oracle.size() ? o.oracle[at] : own;
      if (uniform(kOracle, k) < o.forced_acceptance) return truth;
      return own != truth ? own : static_cast<int32_t>((truth + 1) % V);
    }
    draft_p.push_back(distribution(logits));
    return draw(draft_p.back(), kDraft, k);
  }

  void step() {
    if (finished) return;
    const auto t0 = Clock::now();
    const int64_t before = static_cast<int64_t>(tokens.size());
    std::vector<int32_t> ids{tokens.back()};
    ids.insert(ids.end(), drafts.begin(), drafts.end());
    const int64_t n = seq->length(), gamma = static_cast<int64_t>(drafts.size());
    const ForwardResult r = backend.forward(*seq, ids, {LogitsOf::all, o.drafts > 0});
    stats.verify_s.push_back(seconds_since(t0));

    const ref::Accepted a = accept(r, gamma);
    for (int64_t k = 0; k < gamma && k <= a.count; ++k) {
      ++stats.drafted[size_t(k)];
      stats.accepted[size_t(k)] += k < a.count;
    }
    const std::vector<int32_t> accepted(drafts.begin(), drafts.begin() + a.count);
    for (int64_t k = 0; k < a.count && !finished; ++k) emit(accepted[size_t(k)], row(r.logits, k));
    if (!finished) emit(a.next, row(r.logits, a.count));
    const int64_t emitted = static_cast<int64_t>(tokens.size()) - before;
    seq->truncate(n + emitted);
    if (o.drafts > 0 && !finished) {
      const auto t1 = Clock::now();
      std::vector<int32_t> next = accepted;
      next.push_back(a.next);
      draft_chain(next, std::span(r.hidden).first(size_t(emitted * d)));
      stats.draft_s.push_back(seconds_since(t1));
    } else {
      drafts.clear();
      stats.draft_s.push_back(0);
    }
    ++stats.steps;
    stats.emitted += emitted;
    stats.step_s.push_back(seconds_since(t0));
    check_invariants();
  }

  ref::Accepted accept(const ForwardResult& r, int64_t gamma) const {
    if (o.greedy) {
      std::vector<int32_t> best;
      for (int64_t k = 0; k <= gamma; ++k) best.push_back(ref::argmax(row(r.logits, k)));
      return ref::accept_greedy(best, drafts);
    }
    std::vector<std::vector<double>> p;
    std::vector<double> u;
    for (int64_t k = 0; k <= gamma; ++k) {
      p.push_back(distribution(row(r.logits, k)));
      u.push_back(uniform(k < gamma ? kTest : kEmit, k));
    }
    return ref::accept_sampled(p, draft_p, drafts, u);
  }

  // SPEC 1.32: main cache = prompt + emitted - 1; MTP rows stand for the same tokens until the
  // session ends.
  void check_invariants() const {
    const int64_t want = prompt_length + static_cast<int64_t>(tokens.size()) - 1;
    if (seq->length() != want)
      throw std::logic_error("decode loop: main cache length is not prompt + emitted - 1");
    if (o.drafts > 0 && !finished && seq->mtp_length() != want)
      throw std::logic_error("decode loop: MTP cache length differs from the main cache");
  }

  model::Backend& backend;
  DecodeOptions o;
  int64_t V, d, prompt_length = 0;
  std::unique_ptr<model::Sequence> seq;
  std::vector<int32_t> tokens, drafts;
  std::vector<std::vector<double>> draft_p;  // empty entry: one-hot
  std::vector<float> margins;
  DecodeStats stats;
  bool finished = false;
};

DecodeSession::DecodeSession(model::Backend& b, std::span<const int32_t> prompt,
                             const DecodeOptions& o)
    : impl_(std::make_unique<Impl>(b, prompt, o)) {}
DecodeSession::~DecodeSession() = default;
DecodeSession::DecodeSession(DecodeSession&&) noexcept = default;
bool DecodeSession::done() const { return impl_->finished; }
void DecodeSession::step() { impl_->step(); }
const std::vector<int32_t>& DecodeSession::tokens() const { return impl_->tokens; }
const std::vector<float>& DecodeSession::margins() const { return impl_->margins; }
const DecodeStats& DecodeSession::stats() const { return impl_->stats; }
const model::Sequence& DecodeSession::sequence() const { return *impl_->seq; }

DecodeResult decode(model::Backend& backend, std::span<const int32_t> prompt,
                    const DecodeOptions& options) {
  DecodeSession s(backend, prompt, options);
  while (!s.done()) s.step();
  return {s.tokens(), s.margins(), s.stats()};
}

int64_t first_difference(std::span<const int32_t> a, std::span<const int32_t> b) {
  const size_t n = std::min(a.size(), b.size());
  for (size_t i = 0; i < n; ++i)
    if (a[i] != b[i]) return static_cast<int64_t>(i);
  return a.size() == b.size() ? -1 : static_cast<int64_t>(n);
}

}  // namespace v3b::scen
