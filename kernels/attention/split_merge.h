// The second half of split-KV decode: partial results of one sequence into its output, and sequences without keys.
#pragma once
#include <algorithm>
#include <cstdint>

#include "kernels/core/cuda.h"
#include "reference/spec/attention.h"

namespace v3b::kern {

// Rows of a sequence: s_q queries of n_h heads, row = i * n_h + h.
struct SplitMergeArgs {
  int64_t B, s_q, n_h, d;
  int tile, parts;
  spec::DType dtype;  // of out
  spec::EmptyLse empty_lse;
  const int32_t* lengths;
  const float* partial;  // [parts + B, s_q * n_h, d], normalised
  const float* lse2;     // [parts + B, s_q * n_h], base 2; -inf: no keys
  void* out;             // [B, s_q * n_h, d]
  float* lse;            // [B, n_h, s_q] natural, or null
};
void split_merge(const SplitMergeArgs& a, CudaStream stream);

// Scratch of the two halves: partial results, then lse2.
struct SplitScratch {
  int64_t slots = 0, rows = 0, d = 0;
  int64_t partial_bytes() const { return (slots * rows * d * 4 + 255) / 256 * 256; }
  int64_t bytes() const { return partial_bytes() + slots * rows * 4; }
  float* partial(void* scratch) const { return static_cast<float*>(scratch); }
  float* lse2(void* scratch) const {
    return reinterpret_cast<float*>(static_cast<uint8_t*>(scratch) + partial_bytes());
  }
};
// Parts of the keys, so that parts x blocks_per_part fill the device; no more than there can be tiles.
inline int split_parts(int64_t blocks_per_part, int blocks_per_sm, int64_t most_tiles) {
  const int64_t room = static_cast<int64_t>(cuda_device().sms) * blocks_per_sm;
  return static_cast<int>(
      std::min<int64_t>(std::max<int64_t>(1, room / std::max<int64_t>(1, blocks_per_part)),
                        std::max<int64_t>(1, most_tiles)));
}

}  // namespace v3b::kern
