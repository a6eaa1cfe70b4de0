// Balance losses of the training step: their value and their gradient with respect to the scores or
// logits (SPEC 1.17, 3.7). Internal to kernels/train.
#pragma once
#include <vector>

#include "kernels/train/ffn.h"

namespace v3b::kern::train {

// Sequence-wise loss, averaged over B sequences of S rows: returns its value and adds the gradient
// to s_bar [B*S, E] (if not null). f from the top-K of the unbiased scores without group limit, or
// from the routing actually used (idx).
template <class R>
double sequence_balance(int64_t B, int64_t S, const RouterDims& r, double alpha,
                        bool f_from_routing, const R* s, const int32_t* idx, R* s_bar) {
  std::vector<double> loss(static_cast<size_t>(B), 0.0);
#pragma omp parallel for schedule(static)
  for (int64_t b = 0; b < B; ++b) {
    std::vector<R> f(static_cast<size_t>(r.E), R(0)), P(f);
    std::vector<int32_t> top(static_cast<size_t>(r.K));
    const R unit = R(r.E) / (R(r.K) * R(S));
    for (int64_t t = 0; t < S; ++t) {
      const R* st_ = s + (b * S + t) * r.E;
      const int32_t* chosen = idx + (b * S + t) * r.K;
      if (!f_from_routing) {
        top_k(st_, nullptr, r.E, r.K, top.data());
        chosen = top.data();
      }
      for (int64_t k = 0; k < r.K; ++k) f[static_cast<size_t>(chosen[k])] += unit;
      R sum = 0;
      for (int64_t e = 0; e < r.E; ++e) sum += st_[e];
      for (int64_t e = 0; e < r.E; ++e) P[static_cast<size_t>(e)] += st_[e] / sum / R(S);
    }
    R total = 0;
    for (size_t e = 0; e < f.size(); ++e) total += f[e] * P[e];
    loss[static_cast<size_t>(b)] = alpha * static_cast<double>(total);
    if (s_bar == nullptr) continue;
    for (int64_t t = 0; t < S; ++t) {
      const R* st_ = s + (b * S + t) * r.E;
      R* g = s_bar + (b * S + t) * r.E;
      R sum = 0, fs = 0;
      for (int64_t e = 0; e < r.E; ++e) sum += st_[e], fs += f[static_cast<size_t>(e)] * st_[e];
      const R k = R(alpha) / (R(S) * R(B)) / sum;
      for (int64_t e = 0; e < r.E; ++e) g[e] += k * (f[static_cast<size_t>(e)] - fs / sum);
    }
  }
  double sum = 0;
  for (double v : loss) sum += v;
  return sum / static_cast<double>(B);
}

// Switch loss over the whole batch on p = softmax(z), f over all K assignments divided by K
// (minimum alpha): returns the value, adds the gradient to z_bar [N, E] (if not null).
template <class R>
double switch_balance(int64_t N, const RouterDims& r, double alpha, const R* z,
                      const std::vector<int64_t>& counts, R* z_bar) {
  std::vector<double> f(static_cast<size_t>(r.E)), P(f);
  for (size_t e = 0; e < f.size(); ++e) {
    f[e] = static_cast<double>(counts[e]) / static_cast<double>(N * r.K);
  }
  std::vector<R> p(static_cast<size_t>(r.E));
  for (int64_t t = 0; t < N; ++t) {
    const R* zt = z + t * r.E;
    R mx = zt[0], sum = 0, dot = 0;
    for (int64_t e = 1; e < r.E; ++e) mx = std::max(mx, zt[e]);
    for (size_t e = 0; e < p.size(); ++e) sum += p[e] = exp_of(zt[e] - mx);
    for (size_t e = 0; e < p.size(); ++e) {
      p[e] /= sum;
      P[e] += static_cast<double>(p[e]) / static_cast<double>(N);
      dot += p[e] * R(f[e]);
    }
    if (z_bar == nullptr) continue;
    const R k = R(alpha) * R(r.E) / R(N);
    for (size_t e = 0; e < p.size(); ++e)
      z_bar[t * r.E + static_cast<int64_t>(e)] += k * p[e] * (R(f[e]) - dot);
  }
  double loss = 0;
  for (size_t e = 0; e < f.size(); ++e) loss += f[e] * P[e];
  return alpha * static_cast<double>(r.E) * loss;
}

}  // namespace v3b::kern::train
