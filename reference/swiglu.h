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

// A whole SwiGLU network (experts, shared expert, dense layers): y = (silu(x Wg^T) * (x Wu^T))
// Wd^T. x [T,d], w_gate, w_up [m,d], w_down [d,m] -> y [T,d]. hidden, if not null, keeps gate and
// up rows for the backward: [2, T, m].
template <class S>
void ffn(int64_t T, int64_t d, int64_t m, const S* x, const S* w_gate, const S* w_up,
         const S* w_down, S* y, S* hidden = nullptr);
// dy [T,d] -> dx [T,d] overwritten; dw_* accumulated. `hidden` as ffn left it.
template <class S>
void ffn_backward(int64_t T, int64_t d, int64_t m, const S* x, const S* w_gate, const S* w_up,
                  const S* w_down, const S* hidden, const S* dy, S* dx, S* dw_gate, S* dw_up,
                  S* dw_down);

}  // namespace v3b::ref
