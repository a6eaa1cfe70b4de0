// Sinkhorn projection of residual maps onto the doubly stochastic matrices (SPEC 1.30, mHC), and
// its backward. Instantiated for float and double.
#pragma once
#include <cstdint>

namespace v3b::ref {

constexpr int kSinkhornIterations = 20;  // the t_max of mHC

// logits [T, n, n] -> m [T, n, n] (may be the same array): M = exp(logits), then `iterations`
// times columns to sum 1 first, rows to sum 1 second. In logarithms, so that no spread of the
// logits overflows. Throws v3b::Error(bad_input) if n < 1 or iterations < 1.
template <class S>
void sinkhorn(int64_t T, int64_t n, const S* logits, S* m, int iterations = kSinkhornIterations);

// dm [T, n, n] -> d_logits [T, n, n] overwritten. The 2 * iterations steps are recomputed.
template <class S>
void sinkhorn_backward(int64_t T, int64_t n, const S* logits, const S* dm, S* d_logits,
                       int iterations = kSinkhornIterations);

}  // namespace v3b::ref
