// Softmax rows, cross-entropy and their backward (SPEC 1.5, 1.29, 3.8). Instantiated for float and
// double.
#pragma once
#include <cstdint>

namespace v3b::ref {

// x [T, n] -> y = softmax(scale x) by rows (may be x; null: lse only), lse [T] or null.
template <class S>
void softmax(int64_t T, int64_t n, S scale, const S* x, S* y, S* lse = nullptr);
// y as softmax gave it, dy [T, n] -> dx [T, n] overwritten: scale * y (dy - <dy, y>).
template <class S>
void softmax_backward(int64_t T, int64_t n, S scale, const S* y, const S* dy, S* dx);

// Sum over rows with labels != -100 of -(z_y - logsumexp z); d_logits [T, n] (or null) gets
// (softmax - onehot) * grad_scale, zero rows where ignored. valid, if not null, counts the rows.
template <class S>
S cross_entropy_sum(int64_t T, int64_t n, const S* logits, const int32_t* labels, S grad_scale,
                    S* d_logits, int64_t* valid = nullptr);

}  // namespace v3b::ref
