#include "reference/softmax.h"

#include <Eigen/Core>
#include <cmath>

namespace v3b::ref {
namespace {
template <class S>
using Array = Eigen::Array<S, 1, Eigen::Dynamic>;
template <class S>
using In = Eigen::Map<const Array<S>>;
template <class S>
using Out = Eigen::Map<Array<S>>;
}  // namespace

template <class S>
void softmax(int64_t T, int64_t n, S scale, const S* x, S* y, S* lse) {
  for (int64_t t = 0; t < T; ++t) {
    const Array<S> z = In<S>(x + t * n, n) * scale;
    const S mx = z.maxCoeff();
    const Array<S> e = (z - mx).exp();
    const double total =
        e.template cast<double>().sum();  // f32 sums of long rows would lose digits
    if (y != nullptr) Out<S>(y + t * n, n) = e * S(1 / total);
    if (lse != nullptr) lse[t] = mx + S(std::log(total));
  }
}

template <class S>
void softmax_backward(int64_t T, int64_t n, S scale, const S* y, const S* dy, S* dx) {
  for (int64_t t = 0; t < T; ++t) {
    const In<S> p(y + t * n, n), g(dy + t * n, n);
    const S inner = (p * g).sum();
    Out<S>(dx + t * n, n) = scale * p * (g - inner);
  }
}

template <class S>
S cross_entropy_sum(int64_t T, int64_t n, const S* logits, const int32_t* labels, S grad_scale,
                    S* d_logits, int64_t* valid) {
  S total = 0;
  int64_t count = 0;
  Array<S> p(n);
  for (int64_t t = 0; t < T; ++t) {
    if (labels[t] == -100) {
      if (d_logits != nullptr) Out<S>(d_logits + t * n, n).setZero();
      continue;
    }
    S lse = 0;
    softmax<S>(1, n, S(1), logits + t * n, p.data(), &lse);
    total += lse - logits[t * n + labels[t]];
    ++count;
    if (d_logits != nullptr) {
      Out<S>(d_logits + t * n, n) = p * grad_scale;
      d_logits[t * n + labels[t]] -= grad_scale;
    }
  }
  if (valid != nullptr) *valid = count;
  return total;
}

#define V3B_INSTANTIATE(S)                                                        \
  template void softmax<S>(int64_t, int64_t, S, const S*, S*, S*);                \
  template void softmax_backward<S>(int64_t, int64_t, S, const S*, const S*, S*); \
  template S cross_entropy_sum<S>(int64_t, int64_t, const S*, const int32_t*, S, S*, int64_t*);
V3B_INSTANTIATE(float)
V3B_INSTANTIATE(double)

}  // namespace v3b::ref
