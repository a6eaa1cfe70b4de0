#include "reference/sinkhorn.h"

#include <algorithm>
#include <cmath>
#include <string>
#include <vector>

#include "model/error.h"

namespace v3b::ref {
namespace {

void check(int64_t n, int iterations) {
  if (n < 1 || iterations < 1)
    throw Error(ExitCode::bad_input, "sinkhorn shape", "n, iterations", "both >= 1",
                std::to_string(n) + ", " + std::to_string(iterations));
}

// One half step on logarithms, line by line: l -= logsumexp(line). A line is a column (elements n
// apart, lines 1 apart) or a row (elements 1 apart, lines n apart).
template <class S>
void normalise(int64_t n, bool columns, S* l) {
  const int64_t step = columns ? n : 1, line = columns ? 1 : n;
  for (int64_t i = 0; i < n; ++i) {
    S* v = l + i * line;
    S top = v[0], sum = 0;
    for (int64_t k = 1; k < n; ++k) top = std::max(top, v[k * step]);
    for (int64_t k = 0; k < n; ++k) sum += std::exp(v[k * step] - top);
    const S lse = top + std::log(sum);
    for (int64_t k = 0; k < n; ++k) v[k * step] -= lse;
  }
}

// y: the result of the half step. d y -> d l in place: d l_k = d y_k - exp(y_k) sum d y.
template <class S>
void normalise_backward(int64_t n, bool columns, const S* y, S* d) {
  const int64_t step = columns ? n : 1, line = columns ? 1 : n;
  for (int64_t i = 0; i < n; ++i) {
    S sum = 0;
    for (int64_t k = 0; k < n; ++k) sum += d[i * line + k * step];
    for (int64_t k = 0; k < n; ++k) {
      const int64_t at = i * line + k * step;
      d[at] -= std::exp(y[at]) * sum;
    }
  }
}

}  // namespace

template <class S>
void sinkhorn(int64_t T, int64_t n, const S* logits, S* m, int iterations) {
  check(n, iterations);
  std::copy(logits, logits + T * n * n, m);
  for (int64_t t = 0; t < T; ++t) {
    S* l = m + t * n * n;
    for (int s = 0; s < iterations; ++s) {
      normalise(n, true, l);
      normalise(n, false, l);
    }
    for (int64_t i = 0; i < n * n; ++i) l[i] = std::exp(l[i]);
  }
}

template <class S>
void sinkhorn_backward(int64_t T, int64_t n, const S* logits, const S* dm, S* d_logits,
                       int iterations) {
  check(n, iterations);
  const size_t nn = size_t(n * n);
  std::vector<S> l(nn), d(nn);
  std::vector<std::vector<S>> after;  // logarithms after each half step
  for (int64_t t = 0; t < T; ++t) {
    const int64_t at = t * n * n;
    std::copy(logits + at, logits + at + n * n, l.begin());
    after.clear();
    for (int s = 0; s < 2 * iterations; ++s) {
      normalise(n, s % 2 == 0, l.data());
      after.push_back(l);
    }
    for (size_t i = 0; i < nn; ++i) d[i] = dm[size_t(at) + i] * std::exp(l[i]);
    for (int s = 2 * iterations - 1; s >= 0; --s)
      normalise_backward(n, s % 2 == 0, after[size_t(s)].data(), d.data());
    std::copy(d.begin(), d.end(), d_logits + at);
  }
}

#define V3B_INSTANTIATE(S)                                        \
  template void sinkhorn<S>(int64_t, int64_t, const S*, S*, int); \
  template void sinkhorn_backward<S>(int64_t, int64_t, const S*, const S*, S*, int);
V3B_INSTANTIATE(float)
V3B_INSTANTIATE(double)

}  // namespace v3b::ref
