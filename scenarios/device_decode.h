// Greedy decoding by the CUDA backend's own loop, which never comes back to the host (kernels/forward/cuda_backend.h), in
// the terms of decode_loop.h.
#pragma once
#include "scenarios/decode_loop.h"

namespace v3b::scen {

// drafts: 0 or 1. Emits max_new tokens, eos or not. stats: step_s holds the sum of all steps, verify_s and draft_s one
// mean step each, all by events; margins stay empty.
DecodeResult device_decode(model::Backend& backend, std::span<const int32_t> prompt,
                           int64_t max_new, int64_t drafts);
// margins[at] of a plain continuation, by one pass over the prompt and the tokens before it.
float margin_at(model::Backend& backend, std::span<const int32_t> prompt,
                std::span<const int32_t> tokens, int64_t at);

}  // namespace v3b::scen
