// Causal prefill composed of library products, as somebody without a fused kernel would: for each
// head and block of queries S = Q K^T over all visible keys, softmax, O = P V. S of a block goes
// through memory. Shared by the oneDNN baselines of attention_prefill and mla_prefill.
#pragma once
#include <functional>

#include "kernels/attention/rows.h"

namespace v3b::kern {

struct PrefillHead {
  int64_t T, s0, d_qk, d_v;
  double scale;
  spec::DType dtype;
  const uint8_t* q;
  uint8_t* o;
  int64_t q_stride, o_stride, lse_stride;  // elements between tokens
  float* lse;
  KeySource keys;
  float empty_lse;
};

// All heads and blocks of queries, in parallel; head_at(h) is called by any thread.
void prefill_composed(int64_t T, int64_t n_h, const std::function<PrefillHead(int64_t)>& head_at);

}  // namespace v3b::kern
