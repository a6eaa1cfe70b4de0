#include "reference/swiglu.h"

#include <cmath>

namespace v3b::ref {
namespace {
template <class S>
S sigmoid(S a) {
  const S e = std::exp(-std::abs(a));
  return a >= 0 ? S(1) / (S(1) + e) : e / (S(1) + e);
}
}  // namespace

template <class S>
S silu(S a) {
  return a * sigmoid(a);
}

template <class S>
void swiglu(int64_t T, int64_t m, const S* gate, const S* up, S* y) {
  for (int64_t i = 0; i < T * m; ++i) y[i] = silu(gate[i]) * up[i];
}

template <class S>
void swiglu_backward(int64_t T, int64_t m, const S* gate, const S* up, const S* dy, S* d_gate,
                     S* d_up) {
  for (int64_t i = 0; i < T * m; ++i) {
    const S s = sigmoid(gate[i]), a = gate[i], g = dy[i], u = up[i];
    d_up[i] = g * a * s;
    d_gate[i] = g * u * s * (S(1) + a * (S(1) - s));
  }
}

#define V3B_INSTANTIATE(S)                                           \
  template S silu<S>(S);                                             \
  template void swiglu<S>(int64_t, int64_t, const S*, const S*, S*); \
  template void swiglu_backward<S>(int64_t, int64_t, const S*, const S*, const S*, S*, S*);
V3B_INSTANTIATE(float)
V3B_INSTANTIATE(double)

}  // namespace v3b::ref
