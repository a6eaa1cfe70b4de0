#include "reference/balance.h"

#include <algorithm>
#include <cmath>
#include <numeric>

namespace v3b::ref {

template <class S>
S switch_loss(int64_t T, int64_t E, int64_t K, const S* probs, const int32_t* idx, S alpha,
              S* dprobs) {
  std::vector<S> f(E, 0), P(E, 0);
  for (int64_t i = 0; i < T * K; ++i) f[idx[i]] += S(1) / S(T * K);
  for (int64_t t = 0; t < T; ++t)
    for (int64_t e = 0; e < E; ++e) P[e] += probs[t * E + e] / S(T);
  S loss = 0;
  for (int64_t e = 0; e < E; ++e) loss += alpha * S(E) * f[e] * P[e];
  if (dprobs)
    for (int64_t t = 0; t < T; ++t)
      for (int64_t e = 0; e < E; ++e) dprobs[t * E + e] += alpha * S(E) * f[e] / S(T);
  return loss;
}

template <class S>
S sequence_loss(int64_t T, int64_t E, int64_t K, const S* scores, const int32_t* idx,
                spec::BalanceF f_source, S alpha, S* dscores) {
  std::vector<S> f(E, 0), P(E, 0), sum(T, 0);
  const S unit = S(E) / S(K * T);
  std::vector<int32_t> order(E);
  for (int64_t t = 0; t < T; ++t) {
    const S* s = scores + t * E;
    if (f_source == spec::BalanceF::routing) {
      for (int64_t k = 0; k < K; ++k) f[idx[t * K + k]] += unit;
    } else {
      std::iota(order.begin(), order.end(), 0);
      std::stable_sort(order.begin(), order.end(),
                       [&](int32_t a, int32_t b) { return s[a] > s[b]; });
      for (int64_t k = 0; k < K; ++k) f[order[k]] += unit;
    }
    for (int64_t e = 0; e < E; ++e) sum[t] += s[e];
    for (int64_t e = 0; e < E; ++e) P[e] += s[e] / sum[t] / S(T);
  }
  S loss = 0;
  for (int64_t e = 0; e < E; ++e) loss += alpha * f[e] * P[e];
  if (dscores)
    for (int64_t t = 0; t < T; ++t) {
      const S* s = scores + t * E;
      S inner = 0;
      for (int64_t e = 0; e < E; ++e) inner += f[e] * s[e] / sum[t];
      for (int64_t e = 0; e < E; ++e) dscores[t * E + e] += alpha / S(T) * (f[e] - inner) / sum[t];
    }
  return loss;
}

template <class S>
void bias_update(int64_t E, const int64_t* counts, S u, S* bias) {
  int64_t total = 0;
  for (int64_t e = 0; e < E; ++e) total += counts[e];
  for (int64_t e = 0; e < E; ++e) {  // mean - c_i compared in integers: E*c_i against the total
    const int64_t diff = total - E * counts[e];
    bias[e] += diff > 0 ? u : diff < 0 ? -u : S(0);
  }
}

LoadMetrics load_metrics(int64_t E, const int64_t* load) {
  const double mean =
      static_cast<double>(std::accumulate(load, load + E, int64_t{0})) / static_cast<double>(E);
  LoadMetrics m{};
  if (mean == 0) {
    m.dead = E;
    return m;
  }
  double var = 0, pairs = 0;
  int64_t max = load[0], min = load[0];
  for (int64_t i = 0; i < E; ++i) {
    const double l = static_cast<double>(load[i]);
    max = std::max(max, load[i]);
    min = std::min(min, load[i]);
    m.dead += load[i] == 0;
    var += (l - mean) * (l - mean) / static_cast<double>(E);
    const double p = l / (mean * static_cast<double>(E));
    if (p > 0) m.entropy -= p * std::log(p);
    for (int64_t j = 0; j < E; ++j) pairs += std::abs(l - static_cast<double>(load[j]));
  }
  if (E > 1) m.entropy /= std::log(static_cast<double>(E));
  m.max_over_mean = static_cast<double>(max) / mean;
  m.min_over_mean = static_cast<double>(min) / mean;
  m.max_vio = m.max_over_mean - 1;
  m.cv = std::sqrt(var) / mean;
  m.gini = pairs / (2 * static_cast<double>(E) * static_cast<double>(E) * mean);
  return m;
}

double max_vio_noise_floor(int64_t E, int64_t K, int64_t T) {
  // E[max] = integral of 1 - F over x > 0 minus integral of F over x < 0, with F = Phi(x)^E.
  double expected = 0;
  constexpr double kStep = 1e-3;
  for (double x = -9 + kStep / 2; x < 9; x += kStep) {
    const double f = std::pow(0.5 * std::erfc(-x / std::sqrt(2.0)), static_cast<double>(E));
    expected += kStep * (x > 0 ? 1 - f : -f);
  }
  return expected * std::sqrt(static_cast<double>(E) / static_cast<double>(K * T));
}

#define V3B_INSTANTIATE(S)                                                                         \
  template S switch_loss<S>(int64_t, int64_t, int64_t, const S*, const int32_t*, S, S*);           \
  template S sequence_loss<S>(int64_t, int64_t, int64_t, const S*, const int32_t*, spec::BalanceF, \
                              S, S*);                                                              \
  template void bias_update<S>(int64_t, const int64_t*, S, S*);
V3B_INSTANTIATE(float)
V3B_INSTANTIATE(double)

}  // namespace v3b::ref
