#include "reference/cross_entropy.h"

#include <Eigen/Core>
#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "reference/gemm.h"
#include "reference/spec/lm_head_ce.h"

namespace v3b::ref {
namespace {

template <class S>
using Row = Eigen::Map<const Eigen::Array<S, 1, Eigen::Dynamic>>;

// Sum of exp(z - max) and the maximum, grown piece by piece.
template <class S>
struct OnlineLse {
  S max = -std::numeric_limits<S>::infinity(), sum = 0;
  void add(const S* z, int64_t n) {
    const S m = std::max(max, Row<S>(z, n).maxCoeff());
    if (m == -std::numeric_limits<S>::infinity()) return;
    sum = sum * std::exp(max - m) + (Row<S>(z, n) - m).exp().sum();
    max = m;
  }
  S value() const { return max + std::log(sum); }
};

}  // namespace

template <class S>
S logsumexp_chunked(int64_t V, int64_t chunk, const S* z) {
  OnlineLse<S> lse;
  for (int64_t v = 0; v < V; v += chunk) lse.add(z + v, std::min(chunk, V - v));
  return lse.value();
}
template <class S>
S logsumexp(int64_t V, const S* z) {
  return logsumexp_chunked(V, V, z);
}

template <class S>
CrossEntropySum cross_entropy(int64_t T, int64_t V, const S* logits, const int64_t* labels, S* nll,
                              S* lse) {
  CrossEntropySum total;
  for (int64_t t = 0; t < T; ++t) {
    const S l = logsumexp(V, logits + t * V);
    if (lse != nullptr) lse[t] = l;
    const bool valid = labels[t] != spec::kIgnoreLabel;
    const S loss = valid ? l - logits[t * V + labels[t]] : S(0);
    if (nll != nullptr) nll[t] = loss;
    if (valid) total.nll_sum += static_cast<double>(loss), ++total.valid;
  }
  return total;
}

template <class S>
void cross_entropy_backward(int64_t T, int64_t V, const S* logits, const int64_t* labels, S scale,
                            S* dz) {
  for (int64_t t = 0; t < T; ++t) {
    Eigen::Map<Eigen::Array<S, 1, Eigen::Dynamic>> out(dz + t * V, V);
    if (labels[t] == spec::kIgnoreLabel) {
      out.setZero();
      continue;
    }
    out = (Row<S>(logits + t * V, V) - logsumexp(V, logits + t * V)).exp() * scale;
    out[labels[t]] -= scale;
  }
}

template <class S>
void lm_head_ce(int64_t T, int64_t d, int64_t V, const S* h, const S* w, const int64_t* labels,
                S* nll, S* lse, int32_t* argmax, int64_t chunk) {
  if (chunk <= 0) chunk = V;
  std::vector<OnlineLse<S>> online(T);
  std::vector<S> z(T * std::min(chunk, V)), label_logit(T, S(0)),
      best(T, -std::numeric_limits<S>::infinity());
  if (argmax != nullptr) std::fill(argmax, argmax + T, 0);
  for (int64_t v = 0; v < V; v += chunk) {
    const int64_t n = std::min(chunk, V - v);
    linear(T, d, n, h, w + v * d, z.data());
    for (int64_t t = 0; t < T; ++t) {
      const S* row = z.data() + t * n;
      online[t].add(row, n);
      if (labels != nullptr && labels[t] >= v && labels[t] < v + n)
        label_logit[t] = row[labels[t] - v];
      Eigen::Index at = 0;
      const S m = Row<S>(row, n).maxCoeff(&at);  // first among equals
      if (m > best[t]) {
        best[t] = m;
        if (argmax != nullptr) argmax[t] = static_cast<int32_t>(v + at);
      }
    }
  }
  for (int64_t t = 0; t < T; ++t) {
    lse[t] = online[t].value();
    if (nll != nullptr && labels != nullptr)
      nll[t] = labels[t] == spec::kIgnoreLabel ? S(0) : lse[t] - label_logit[t];
  }
}

#define V3B_INSTANTIATE(S)                                                                       \
  template S logsumexp<S>(int64_t, const S*);                                                    \
  template S logsumexp_chunked<S>(int64_t, int64_t, const S*);                                   \
  template CrossEntropySum cross_entropy<S>(int64_t, int64_t, const S*, const int64_t*, S*, S*); \
  template void cross_entropy_backward<S>(int64_t, int64_t, const S*, const int64_t*, S, S*);    \
  template void lm_head_ce<S>(int64_t, int64_t, int64_t, const S*, const S*, const int64_t*, S*, \
                              S*, int32_t*, int64_t);
V3B_INSTANTIATE(float)
V3B_INSTANTIATE(double)

}  // namespace v3b::ref
