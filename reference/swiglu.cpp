#include "reference/swiglu.h"

#include <Eigen/Core>
#include <cmath>

namespace v3b::ref {
namespace {
template <class S>
using Matrix = Eigen::Matrix<S, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;
template <class S>
using In = Eigen::Map<const Matrix<S>>;
template <class S>
using Out = Eigen::Map<Matrix<S>>;
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

template <class S>
void ffn(int64_t T, int64_t d, int64_t m, const S* x, const S* w_gate, const S* w_up,
         const S* w_down, S* y, S* hidden) {
  const In<S> X(x, T, d), G(w_gate, m, d), U(w_up, m, d), D(w_down, d, m);
  Matrix<S> g = X * G.transpose(), u = X * U.transpose(), h(T, m);
  swiglu(T, m, g.data(), u.data(), h.data());
  Out<S>(y, T, d) = h * D.transpose();
  if (hidden != nullptr) {
    Out<S>(hidden, T, m) = g;
    Out<S>(hidden + T * m, T, m) = u;
  }
}

template <class S>
void ffn_backward(int64_t T, int64_t d, int64_t m, const S* x, const S* w_gate, const S* w_up,
                  const S* w_down, const S* hidden, const S* dy, S* dx, S* dw_gate, S* dw_up,
                  S* dw_down) {
  const In<S> X(x, T, d), G(w_gate, m, d), U(w_up, m, d), D(w_down, d, m), dY(dy, T, d);
  Matrix<S> h(T, m), dg(T, m), du(T, m);
  swiglu(T, m, hidden, hidden + T * m, h.data());
  const Matrix<S> dh = dY * D;
  swiglu_backward(T, m, hidden, hidden + T * m, dh.data(), dg.data(), du.data());
  Out<S>(dw_down, d, m) += dY.transpose() * h;
  Out<S>(dw_gate, m, d) += dg.transpose() * X;
  Out<S>(dw_up, m, d) += du.transpose() * X;
  Out<S>(dx, T, d) = dg * G + du * U;
}

#define V3B_INSTANTIATE(S)                                                                         \
  template S silu<S>(S);                                                                           \
  template void swiglu<S>(int64_t, int64_t, const S*, const S*, S*);                               \
  template void swiglu_backward<S>(int64_t, int64_t, const S*, const S*, const S*, S*, S*);        \
  template void ffn<S>(int64_t, int64_t, int64_t, const S*, const S*, const S*, const S*, S*, S*); \
  template void ffn_backward<S>(int64_t, int64_t, int64_t, const S*, const S*, const S*, const S*, \
                                const S*, const S*, S*, S*, S*, S*);
V3B_INSTANTIATE(float)
V3B_INSTANTIATE(double)

}  // namespace v3b::ref
