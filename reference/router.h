// Routers and their backward (SPEC 1.11, 1.12, 3.6), plain. Instantiated for float and double.
#pragma once
#include <cstdint>
#include <vector>

#include "reference/spec/router.h"

namespace v3b::ref {

template <class S>
struct Routes {
  int64_t T = 0, K = 0;
  std::vector<int32_t> idx;  // [T, K], larger selection score first, ties to the lower index
  std::vector<S> weight;     // [T, K] gate weights
  std::vector<S> scores;     // [T, E] sigmoid(z) or softmax(z), without bias
  std::vector<S> gap;  // [T] how far the choice is from changing: the smaller of the expert margin
      // (K-th minus best rejected among allowed) and the group margin (M-th minus next)
};

// logits [T, E] = x W_g^T; bias [E] or null (selection only).
template <class S>
Routes<S> route(const spec::RouterConfig& c, int64_t T, const S* logits, const S* bias);

// dweight [T, K] -> dlogits [T, E] (overwritten). Selection is locally constant: the exact gradient.
// extra_dscores [T, E] or null: gradient that reaches the scores directly (balance losses).
template <class S>
void route_backward(const spec::RouterConfig& c, const Routes<S>& r, const S* dweight,
                    const S* extra_dscores, S* dlogits);

}  // namespace v3b::ref
