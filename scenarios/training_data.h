// The order of training windows and the evaluation loop. Internal to scenarios/training*.cpp.
#pragma once
#include <cstdint>
#include <vector>

#include "model/corpus.h"

namespace v3b::scen {

// Documents in a random order (per epoch), one after the other, cut into windows of S+1 tokens at
// stride S, the windows in a random order again. Everything follows from (seed, position).
class WindowOrder {
 public:
  WindowOrder(const model::TokenStream& stream, int64_t context, uint64_t seed,
              int64_t min_document_tokens);
  int64_t windows_per_epoch() const { return static_cast<int64_t>(order_.size()); }
  // Fills tokens [B, S+1] with windows position*B ...
  void batch(int64_t position, int64_t B, int32_t* tokens);

 private:
  void build(int64_t epoch);
  const model::TokenStream& stream_;
  int64_t context_, epoch_ = -1, min_tokens_;
  uint64_t seed_;
  std::vector<int32_t> ids_;
  std::vector<int64_t> order_;  // window starts
};

}  // namespace v3b::scen
