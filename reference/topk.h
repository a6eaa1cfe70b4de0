// Plain top-k selection and both backward forms (SPEC 1.24), float and double.
#pragma once
#include <cstdint>

namespace v3b::ref {

// s [T,E] -> idx [T,K] in order of selection (larger first, then lower index), values [T,K] or
// null. NaN scores are never chosen before a number. K <= E.
template <class S>
void topk_select(int64_t T, int64_t E, int64_t K, const S* s, int32_t* idx, S* values);

// Gradient of values = topk(s): scatter of dvalues [T,K] into zeros ds [T,E]. Exact almost
// everywhere.
template <class S>
void topk_backward_values(int64_t T, int64_t E, int64_t K, const int32_t* idx, const S* dvalues,
                          S* ds);

// Gradient of the masked scores y_i = s_i if selected else 0, from dy [T,E] to ds [T,E].
// ste false: exact (dy where selected, 0 elsewhere); true: straight-through (dy everywhere).
template <class S>
void topk_backward(int64_t T, int64_t E, int64_t K, const int32_t* idx, const S* dy, S* ds,
                   bool ste);

}  // namespace v3b::ref
