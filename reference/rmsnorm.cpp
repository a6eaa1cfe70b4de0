#include "reference/rmsnorm.h"

#include <Eigen/Core>
#include <cmath>

namespace v3b::ref {
namespace {
template <class S>
using Rows = Eigen::Map<const Eigen::Array<S, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>>;
template <class S>
using Row = Eigen::Map<const Eigen::Array<S, 1, Eigen::Dynamic>>;
}  // namespace

template <class S>
S round_to(S v, spec::DType dtype) {
  switch (dtype) {
    case spec::DType::f32:
      return static_cast<S>(static_cast<float>(v));
    case spec::DType::bf16:
      return static_cast<S>(spec::to_float(spec::to_bf16(static_cast<float>(v))));
    case spec::DType::f16:
      return static_cast<S>(spec::to_float(spec::to_f16(static_cast<float>(v))));
    case spec::DType::f8e4m3:
      return static_cast<S>(spec::to_float(spec::to_f8e4m3(static_cast<float>(v))));
    default:
      return v;
  }
}

template <class S>
void rmsnorm(int64_t T, int64_t d, S eps, const S* x, const S* w, S* y, spec::NormRounding rounding,
             spec::DType storage) {
  const Rows<S> X(x, T, d);
  const Row<S> W(w, d);
  Eigen::Map<Eigen::Array<S, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>> Y(y, T, d);
  for (int64_t t = 0; t < T; ++t) {
    const S r = S(1) / std::sqrt(X.row(t).square().mean() + eps);
    Y.row(t) = X.row(t) * r;
    if (rounding == spec::NormRounding::hf)
      Y.row(t) = Y.row(t).unaryExpr([&](S v) { return round_to(v, storage); }).eval();
    Y.row(t) *= W;
  }
}

template <class S>
void rmsnorm_backward(int64_t T, int64_t d, S eps, const S* x, const S* w, const S* dy, S* dx,
                      S* dw) {
  const Rows<S> X(x, T, d), dY(dy, T, d);
  const Row<S> W(w, d);
  Eigen::Map<Eigen::Array<S, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>> dX(dx, T, d);
  Eigen::Map<Eigen::Array<S, 1, Eigen::Dynamic>> dW(dw, d);
  for (int64_t t = 0; t < T; ++t) {
    const S r = S(1) / std::sqrt(X.row(t).square().mean() + eps);
    dW += dY.row(t) * X.row(t) * r;
    const S s = (dY.row(t) * W * X.row(t)).sum();
    dX.row(t) = r * W * dY.row(t) - (r * r * r / S(d)) * s * X.row(t);
  }
}

#define V3B_INSTANTIATE(S)                                                                  \
  template S round_to<S>(S, spec::DType);                                                   \
  template void rmsnorm<S>(int64_t, int64_t, S, const S*, const S*, S*, spec::NormRounding, \
                           spec::DType);                                                    \
  template void rmsnorm_backward<S>(int64_t, int64_t, S, const S*, const S*, const S*, S*, S*);
V3B_INSTANTIATE(float)
V3B_INSTANTIATE(double)

}  // namespace v3b::ref
