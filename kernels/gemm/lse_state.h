// Running log-sum-exp and argmax of logits. Internal to kernels/gemm.
#pragma once
#include <cmath>
#include <cstdint>
#include <limits>

#include "reference/spec/lm_head_ce.h"

namespace v3b::kern {

struct LseState {
  float max = -std::numeric_limits<float>::infinity();
  float sum = 0;  // of exp(z - max); NaN once a logit was
  float label_logit = 0;
  int32_t argmax = 0;
  // Of row t into its arrays; labels, nll and best may be null.
  void finish(int64_t t, const int64_t* labels, float* nll, float* lse,
              int32_t* best) const noexcept;
};

inline int64_t lse_label(const int64_t* labels, int64_t t) noexcept {
  return labels == nullptr ? spec::kIgnoreLabel : labels[t];
}

// The later of two neighbouring ranges into the earlier one.
inline void lse_merge(const LseState& next, LseState& s) noexcept {
  if (next.max > s.max) {
    s.sum = s.sum * std::exp(s.max - next.max) + next.sum;
    s.max = next.max;
    s.argmax = next.argmax;
  } else if (next.max == s.max) {  // -inf too
    s.sum += next.sum;
  } else {
    s.sum += next.sum * std::exp(next.max - s.max);
  }
  s.label_logit += next.label_logit;  // 0 where the label lies elsewhere
}

// Folds z[0..n), columns first..first+n of a row, into its state.
void lse_fold(const float* z, int64_t n, int64_t first, int64_t label, LseState& s) noexcept;
// The same of many rows as lanes: z [n, ld] holds logits first..first+n of rows 0..width (a multiple
// of 16) innermost; max, sum, argmax [width]. Labels are the caller's.
void lse_fold_lanes(const float* z, int64_t ld, int64_t n, int64_t first, int64_t width, float* max,
                    float* sum, int32_t* argmax) noexcept;
const char* lse_isa() noexcept;

}  // namespace v3b::kern
