// Plain and speculative decoding over any backend (SPEC 1.28, 1.32): the MTP module drafts, the
// main model verifies. One session is one sequence; step() is one main forward, so that callers can
// interleave sessions.
#pragma once
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "model/backend.h"

namespace v3b::scen {

struct DecodeOptions {
  int64_t max_new = 64;     // tokens to emit, the one that prefill gives included
  bool stop_at_eos = true;  // the eos token is emitted, nothing after it
  int64_t drafts = 0;  // 0: plain decoding; 1: as V3; more: the module recycled (post-norm state)
  bool greedy = true;
  double temperature = 1, top_p = 1;  // sampling only; the same for target and draft
  uint64_t seed = 1;
  // Draft oracle: with this probability a draft is the token that greedy decoding emits, else
  // another one. The MTP module still runs and costs its time. Needs greedy and `oracle`, the plain
  // continuation; stops at its end.
  double forced_acceptance = -1;
  std::vector<int32_t> oracle;
};

struct DecodeStats {
  int64_t steps = 0;    // main forwards after prefill
  int64_t emitted = 0;  // tokens from steps (prefill's token not counted)
  std::vector<int64_t> drafted,
      accepted;  // [drafts] by position: verified given that all before were accepted
  double prefill_s = 0, mtp_prefill_s = 0;
  std::vector<double> step_s;    // whole steps: verify, acceptance, drafting
  std::vector<double> verify_s;  // the main forward of each step
  std::vector<double> draft_s;   // all MTP work of each step
  double tokens_per_step() const { return steps > 0 ? double(emitted) / double(steps) : 0; }
};

class DecodeSession {
 public:
  // Runs prefill (main, and MTP if drafts > 0) and emits the first token. Throws v3b::Error on bad
  // ids, on drafts without an MTP module, and on options that do not fit together.
  DecodeSession(model::Backend& backend, std::span<const int32_t> prompt,
                const DecodeOptions& options);
  ~DecodeSession();
  DecodeSession(DecodeSession&&) noexcept;

  bool done() const;
  // One main forward; emits 1..drafts+1 tokens. Checks the invariants of SPEC 1.32 (cache lengths)
  // and throws std::logic_error if one is broken. No-op when done.
  void step();
  const std::vector<int32_t>& tokens() const;  // emitted, prompt not included
  // Of each emitted token: (largest - second logit) / RMS of its row; a near-tie is below 1e-2
  // (SPEC 1.28).
  const std::vector<float>& margins() const;
  const DecodeStats& stats() const;
  const model::Sequence& sequence() const;

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

struct DecodeResult {
  std::vector<int32_t> tokens;
  std::vector<float> margins;
  DecodeStats stats;
};
DecodeResult decode(model::Backend& backend, std::span<const int32_t> prompt,
                    const DecodeOptions& options);

// (largest - second) / RMS of a row of logits.
float margin_of(std::span<const float> logits);

// First position where the two differ (or one ends), -1 if equal.
int64_t first_difference(std::span<const int32_t> a, std::span<const int32_t> b);

}  // namespace v3b::scen
