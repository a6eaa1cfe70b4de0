#include "reference/router.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>

namespace v3b::ref {
namespace {

// Indices of the n largest values, larger first, ties to the lower index.
template <class S>
std::vector<int32_t> top_n(const std::vector<S>& v, int64_t n) {
  std::vector<int32_t> order(v.size());
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](int32_t a, int32_t b) { return v[a] > v[b]; });
  order.resize(static_cast<size_t>(n));
  return order;
}

// n-th largest minus (n+1)-th largest; infinity when nothing is left out.
template <class S>
S margin(std::vector<S> v, int64_t n) {
  if (n >= static_cast<int64_t>(v.size())) return std::numeric_limits<S>::infinity();
  std::sort(v.begin(), v.end(), std::greater<S>());
  return v[n - 1] - v[n];
}

template <class S>
std::vector<S> group_scores(const spec::RouterConfig& c, const std::vector<S>& biased) {
  const int64_t size = c.E / c.G;
  std::vector<S> g(static_cast<size_t>(c.G));
  for (int64_t j = 0; j < c.G; ++j) {
    std::vector<S> in(biased.begin() + j * size, biased.begin() + (j + 1) * size);
    std::sort(in.begin(), in.end(), std::greater<S>());
    g[j] = c.group_rule == spec::GroupRule::top2_sum ? in[0] + in[1] : in[0];
  }
  return g;
}

template <class S>
void scores_of_row(const spec::RouterConfig& c, const S* z, S* s) {
  if (c.scoring == spec::Scoring::sigmoid) {
    for (int64_t e = 0; e < c.E; ++e) s[e] = S(1) / (S(1) + std::exp(-z[e]));
    return;
  }
  const S m = *std::max_element(z, z + c.E);
  S sum = 0;
  for (int64_t e = 0; e < c.E; ++e) sum += s[e] = std::exp(z[e] - m);
  for (int64_t e = 0; e < c.E; ++e) s[e] /= sum;
}

template <class S>
S gate_scale(const spec::RouterConfig& c, bool normalised) {
  return c.scale_only_if_unnormalised && normalised ? S(1) : static_cast<S>(c.c_r);
}

}  // namespace

template <class S>
Routes<S> route(const spec::RouterConfig& c, int64_t T, const S* logits, const S* bias) {
  Routes<S> r;
  r.T = T;
  r.K = c.K;
  r.idx.resize(T * c.K);
  r.weight.resize(T * c.K);
  r.scores.resize(T * c.E);
  r.gap.resize(T);
  const bool normalise = c.norm_topk_prob && c.K > 1;
  for (int64_t t = 0; t < T; ++t) {
    S* s = r.scores.data() + t * c.E;
    scores_of_row(c, logits + t * c.E, s);
    std::vector<S> biased(s, s + c.E);
    if (bias)
      for (int64_t e = 0; e < c.E; ++e) biased[e] += bias[e];
    S gap = std::numeric_limits<S>::infinity();
    if (c.group_rule != spec::GroupRule::none && c.G > 1) {
      const std::vector<S> g = group_scores(c, biased);
      gap = margin(g, c.M);
      std::vector<char> kept(c.G, 0);
      for (int32_t j : top_n(g, c.M)) kept[j] = 1;
      const S masked =
          c.router_mask == spec::RouterMask::neg_inf ? -std::numeric_limits<S>::infinity() : S(0);
      for (int64_t e = 0; e < c.E; ++e)
        if (!kept[e / (c.E / c.G)]) biased[e] = masked;
    }
    gap = std::min(gap, margin(biased, c.K));
    r.gap[t] = gap;
    const std::vector<int32_t> chosen = top_n(biased, c.K);
    S sum = 0;
    for (int32_t e : chosen) sum += s[e];
    if (c.gate_eps == spec::GateEps::eps_1e20) sum += S(1e-20);
    for (int64_t k = 0; k < c.K; ++k) {
      r.idx[t * c.K + k] = chosen[k];
      r.weight[t * c.K + k] =
          (normalise ? s[chosen[k]] / sum : s[chosen[k]]) * gate_scale<S>(c, normalise);
    }
  }
  return r;
}

template <class S>
void route_backward(const spec::RouterConfig& c, const Routes<S>& r, const S* dweight,
                    const S* extra_dscores, S* dlogits) {
  const bool normalise = c.norm_topk_prob && c.K > 1;
  const S scale = gate_scale<S>(c, normalise);
  std::vector<S> ds(c.E);
  for (int64_t t = 0; t < r.T; ++t) {
    const S* s = r.scores.data() + t * c.E;
    const int32_t* idx = r.idx.data() + t * c.K;
    const S* w = r.weight.data() + t * c.K;
    const S* dw = dweight + t * c.K;
    for (int64_t e = 0; e < c.E; ++e) ds[e] = extra_dscores ? extra_dscores[t * c.E + e] : S(0);
    S tau = c.gate_eps == spec::GateEps::eps_1e20 ? S(1e-20) : S(0), dot = 0;
    for (int64_t k = 0; k < c.K; ++k) {
      tau += s[idx[k]];
      dot += dw[k] * w[k] / scale;
    }
    for (int64_t k = 0; k < c.K; ++k)
      ds[idx[k]] += normalise ? scale / tau * (dw[k] - dot) : scale * dw[k];
    S* dz = dlogits + t * c.E;
    if (c.scoring == spec::Scoring::sigmoid) {
      for (int64_t e = 0; e < c.E; ++e) dz[e] = ds[e] * s[e] * (S(1) - s[e]);
    } else {
      S inner = 0;
      for (int64_t e = 0; e < c.E; ++e) inner += ds[e] * s[e];
      for (int64_t e = 0; e < c.E; ++e) dz[e] = s[e] * (ds[e] - inner);
    }
  }
}

#define V3B_INSTANTIATE(S)                                                                         \
  template Routes<S> route<S>(const spec::RouterConfig&, int64_t, const S*, const S*);             \
  template void route_backward<S>(const spec::RouterConfig&, const Routes<S>&, const S*, const S*, \
                                  S*);
V3B_INSTANTIATE(float)
V3B_INSTANTIATE(double)

}  // namespace v3b::ref
