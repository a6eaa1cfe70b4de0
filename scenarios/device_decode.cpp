#include "scenarios/device_decode.h"

#include <algorithm>

#include "kernels/forward/cuda_backend.h"

namespace v3b::scen {

DecodeResult device_decode(model::Backend& backend, std::span<const int32_t> prompt,
                           int64_t max_new, int64_t drafts) {
  const std::vector<std::vector<int32_t>> prompts = {{prompt.begin(), prompt.end()}};
  kern::CudaDecodeResult r = kern::cuda_decode_greedy(backend, prompts, max_new, drafts);
  DecodeResult out;
  out.tokens = std::move(r.tokens[0]);
  DecodeStats& s = out.stats;
  s.steps = r.steps, s.emitted = r.emitted;
  s.prefill_s = r.prefill_seconds;
  if (drafts > 0) s.drafted = {r.drafts}, s.accepted = {r.accepted};
  if (r.steps == 0) return out;
  s.step_s = {r.seconds};
  s.verify_s = {r.main_seconds};
  s.draft_s = {std::max(0.0, r.seconds / static_cast<double>(r.steps) - r.main_seconds)};
  return out;
}

float margin_at(model::Backend& backend, std::span<const int32_t> prompt,
                std::span<const int32_t> tokens, int64_t at) {
  std::vector<int32_t> ids(prompt.begin(), prompt.end());
  ids.insert(ids.end(), tokens.begin(), tokens.begin() + at);
  const auto sequence = backend.new_sequence();
  return margin_of(backend.forward(*sequence, ids, {.logits = model::LogitsOf::last}).logits);
}

}  // namespace v3b::scen
