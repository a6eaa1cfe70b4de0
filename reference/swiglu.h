// SwiGLU activation and its backward (SPEC 1.13, 3.4). Instantiated for float and double.
#pragma once
#include <cstdint>

namespace v3b::ref {

template <class S>
S silu(S a);
// gate, up [T, m] -> y [T, m] = silu(gate) * up.
template <class S>
void swiglu(int64_t T, int64_t m, const S* gate, const S* up, S* y);
// dy [T, m] -> d_gate, d_up [T, m], both overwritten.
template <class S>
void swiglu_backward(int64_t T, int64_t m, const S* gate, const S* up, const S* dy, S* d_gate,
                     S* d_up);

}  // namespace v3b::ref
