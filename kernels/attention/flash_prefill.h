// Causal attention over contiguous keys on tensor cores, the one kernel behind attention_prefill and mla_prefill.
#pragma once
#include <cstdint>

#include "kernels/core/cuda.h"
#include "reference/spec/attention.h"

namespace v3b::kern {

// A key is d1 elements of k1 and then d2 of k2; strides in elements. Head h reads key/value head h / group; k2 is shared
// by all heads.
struct FlashArgs {
  int64_t T, s0, n_h, group, d1, d2, d_v;
  double scale;
  spec::EmptyLse empty_lse;
  const spec::bf16 *q, *k1, *k2, *v;
  int64_t q_row, k1_row, k1_head, k2_row, v_row, v_head, o_row;
  spec::bf16* o;
  float* lse;  // [T, n_h], or null
};
inline constexpr int64_t kFlashMost = 256;  // d1 + d2 and d_v
void flash_prefill(const FlashArgs& a, CudaStream stream);

}  // namespace v3b::kern
