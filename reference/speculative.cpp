#include "reference/speculative.h"

#include <algorithm>
#include <cmath>
#include <numeric>

namespace v3b::ref {

std::vector<double> sampling_distribution(std::span<const float> logits, double temperature,
                                          double top_p) {
  std::vector<double> p(logits.size());
  const double mx = *std::max_element(logits.begin(), logits.end());
  double total = 0;
  for (size_t i = 0; i < p.size(); ++i) total += p[i] = std::exp((logits[i] - mx) / temperature);
  for (double& v : p) v /= total;
  if (top_p >= 1) return p;
  // Largest first, ties to the lower id; a heap, since few are needed of a large vocabulary.
  std::vector<int32_t> heap(p.size());
  std::iota(heap.begin(), heap.end(), 0);
  const auto after = [&](int32_t a, int32_t b) {
    return p[size_t(a)] != p[size_t(b)] ? p[size_t(a)] < p[size_t(b)] : a > b;
  };
  std::make_heap(heap.begin(), heap.end(), after);
  double kept = 0;
  auto rest = heap.end();  // [rest, end): taken
  while (rest != heap.begin() && kept < top_p) {
    std::pop_heap(heap.begin(), rest, after);
    kept += p[size_t(*--rest)];
  }
  std::vector<double> out(p.size(), 0.0);
  for (auto t = rest; t != heap.end(); ++t) out[size_t(*t)] = p[size_t(*t)] / kept;
  return out;
}

namespace {
template <class T>
int32_t largest(std::span<const T> v) {
  return static_cast<int32_t>(std::max_element(v.begin(), v.end()) -
                              v.begin());  // the first of equals
}
}  // namespace
int32_t argmax(std::span<const float> v) { return largest(v); }
int32_t argmax(std::span<const double> v) { return largest(v); }

int32_t sample(std::span<const double> p, double u) {
  double total = 0;
  for (double v : p) total += v;
  const double mark = u * total;
  double sum = 0;
  int32_t last = 0;
  for (size_t i = 0; i < p.size(); ++i) {
    if (!(p[i] > 0)) continue;
    sum += p[i];
    last = static_cast<int32_t>(i);
    if (sum > mark) return last;
  }
  return last;
}

double acceptance_rate(std::span<const double> p, std::span<const double> q) {
  double beta = 0;
  for (size_t i = 0; i < p.size(); ++i) beta += std::min(p[i], q[i]);
  return beta;
}

std::vector<double> residual(std::span<const double> p, std::span<const double> q) {
  std::vector<double> r(p.size());
  double total = 0;
  for (size_t i = 0; i < p.size(); ++i) total += r[i] = std::max(0.0, p[i] - q[i]);
  if (!(total > 0)) return {p.begin(), p.end()};
  for (double& v : r) v /= total;
  return r;
}

Accepted accept_sampled(std::span<const std::vector<double>> p,
                        std::span<const std::vector<double>> q, std::span<const int32_t> draft,
                        std::span<const double> uniform) {
  const size_t gamma = draft.size();
  for (size_t k = 0; k < gamma; ++k) {
    const size_t x = static_cast<size_t>(draft[k]);
    const bool one_hot = q[k].empty();
    const double qx = one_hot ? 1.0 : q[k][x];
    // u < p/q without the division: a draft of q = 0 cannot have been drawn from q; it is rejected.
    if (uniform[k] * qx < p[k][x] && qx > 0) continue;
    std::vector<double> at_x;
    if (one_hot) {
      at_x.assign(p[k].size(), 0.0);
      at_x[x] = 1.0;
    }
    const std::vector<double> r = residual(p[k], one_hot ? at_x : q[k]);
    return {static_cast<int64_t>(k), sample(r, uniform[gamma])};
  }
  return {static_cast<int64_t>(gamma), sample(p[gamma], uniform[gamma])};
}

Accepted accept_greedy(std::span<const int32_t> best, std::span<const int32_t> draft) {
  size_t k = 0;
  while (k < draft.size() && draft[k] == best[k]) ++k;
  return {static_cast<int64_t>(k), best[k]};
}

void mtp_accept(const spec::MtpAcceptArgs& a) {
  for (int64_t b = 0; b < a.B; ++b) {
    const std::span<const int32_t> draft(a.draft + b * a.gamma, static_cast<size_t>(a.gamma));
    const auto row = [&](const float* base, int64_t rows, int64_t k) {
      const float* r = base + (b * rows + k) * a.V;
      return std::vector<double>(r, r + a.V);
    };
    Accepted r;
    if (a.greedy) {
      std::vector<int32_t> best;
      for (int64_t k = 0; k <= a.gamma; ++k) best.push_back(argmax(row(a.p, a.gamma + 1, k)));
      r = accept_greedy(best, draft);
    } else {
      std::vector<std::vector<double>> p, q;
      for (int64_t k = 0; k <= a.gamma; ++k) p.push_back(row(a.p, a.gamma + 1, k));
      for (int64_t k = 0; k < a.gamma; ++k)
        q.push_back(a.q != nullptr ? row(a.q, a.gamma, k) : std::vector<double>{});
      r = accept_sampled(
          p, q, draft, std::span(a.uniform + b * (a.gamma + 1), static_cast<size_t>(a.gamma + 1)));
    }
    a.accepted[b] = static_cast<int32_t>(r.count);
    for (int64_t k = 0; k <= a.gamma; ++k)
      a.tokens[b * (a.gamma + 1) + k] = k < r.count ? draft[size_t(k)] : k == r.count ? r.next : -1;
  }
}

double tokens_per_step(std::span<const double> alpha) {
  double tau = 1, reach = 1;
  for (double a : alpha) tau += reach *= a;
  return tau;
}
double tokens_per_step(double alpha, int64_t gamma) {
  double tau = 0, reach = 1;
  for (int64_t k = 0; k <= gamma; ++k, reach *= alpha) tau += reach;
  return tau;
}
double speedup(double tau, double t_base, double t_verify, double t_draft, int64_t gamma) {
  return tau * t_base / (t_verify + static_cast<double>(gamma) * t_draft);
}
double break_even(double t_base, double t_verify, double t_draft) {
  return (t_verify + t_draft) / t_base - 1;
}

}  // namespace v3b::ref
