// The CUDA backend (SPEC 1.32): weights in device memory, paged latent cache on the device, expanded MLA for prefill and
// absorbed MLA for decode, grouped experts, MTP module; and a greedy decode loop that stays on the device.
#pragma once
#include <cstdint>
#include <span>
#include <vector>

#include "model/backend.h"

namespace v3b::kern {

// compute: bf16 ("cuda_bf16") or f32 ("cuda_f32", no tensor cores). Throws v3b::Error (nothing_ran) where there is no
// device. Dynamic RoPE scaling: one sequence a call, and no call that changes the rotation of cached keys (as in the CPU
// backend).
// Residual stream, router and softmax in f32, as in the CPU backend.
std::unique_ptr<model::Backend> make_cuda_backend(model::WeightsPtr weights, spec::DType compute,
                                                  const model::BackendOptions& options = {});

struct CudaDecodeResult {
  std::vector<std::vector<int32_t>> tokens;  // [B] emitted, the one that prefill gives included
  int64_t steps = 0;                         // replays of the captured step after prefill
  int64_t emitted = 0;                       // tokens of these steps, over all sequences
  int64_t drafts = 0, accepted = 0;          // over all sequences
  double prefill_seconds = 0;                // on the host's clock: main and, with drafts, MTP
  double seconds = 0;                        // of all steps, by events
  double main_seconds =
      0;  // of one step's main forward with its argmax, by events: mean of replays
          // at the first and at the last length
};
// Greedy continuation of B prompts, all steps on the device: one captured graph a step, no host round trip until the last
// one. drafts 0: plain; 1: the MTP module drafts one token a step (SPEC 1.28, 1.32). Sequences stop at max_new tokens,
// not at eos. `backend` must come from make_cuda_backend.
CudaDecodeResult cuda_decode_greedy(model::Backend& backend,
                                    std::span<const std::vector<int32_t>> prompts, int64_t max_new,
                                    int64_t drafts);

// Device memory that the caches' pages take, used or not.
int64_t cuda_cache_bytes(model::Backend& backend);

}  // namespace v3b::kern
