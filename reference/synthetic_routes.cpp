#include "reference/synthetic_routes.h"

#include <algorithm>
#include <cmath>
#include <numeric>

#include "model/rng.h"

namespace v3b::ref {
namespace {

// K distinct experts a token without replacement, probabilities as weights: the K smallest of
// -log(u)/p.
std::vector<int32_t> drawn(int64_t T, int64_t K, const std::vector<double>& p, uint64_t seed) {
  const int64_t E = static_cast<int64_t>(p.size());
  const model::Rng rng{seed, model::rng_stream("synthetic_routes")};
  std::vector<int32_t> idx, order(E);
  std::vector<double> key(E);
  for (int64_t t = 0; t < T; ++t) {
    for (int64_t e = 0; e < E; ++e)
      key[e] = -std::log(1 - model::rng_uniform(rng, static_cast<uint64_t>(t * E + e))) / p[e];
    std::iota(order.begin(), order.end(), 0);
    std::partial_sort(order.begin(), order.begin() + K, order.end(), [&](int32_t a, int32_t b) {
      return key[a] < key[b] || (key[a] == key[b] && a < b);
    });
    idx.insert(idx.end(), order.begin(), order.begin() + K);
  }
  return idx;
}

// Expert 0 for the first `load` tokens, the others in turn.
std::vector<int32_t> exact(int64_t T, int64_t E, int64_t K, double ratio) {
  const double mean = static_cast<double>(T * K) / static_cast<double>(E);
  const int64_t least = E == K ? T : 0;  // with K == E every token needs every expert
  const int64_t load = std::clamp(static_cast<int64_t>(std::lround(ratio * mean)), least, T);
  std::vector<int32_t> idx;
  int64_t next = 0;
  for (int64_t t = 0; t < T; ++t) {
    int64_t k = 0;
    // Spread the tokens of expert 0 over the call: token t has it if the running count steps.
    if ((t + 1) * load / T > t * load / T) idx.push_back(0), ++k;
    for (; k < K; ++k) idx.push_back(static_cast<int32_t>(1 + next++ % (E - 1)));
  }
  return idx;
}

}  // namespace

std::vector<int32_t> synthetic_routes(int64_t T, int64_t E, int64_t K, const RouteMix& mix,
                                      uint64_t seed) {
  if (E == 1) return std::vector<int32_t>(static_cast<size_t>(T * K), 0);
  if (mix.ratio >= 1) return exact(T, E, K, mix.ratio);
  std::vector<double> p(mix.hot > 0 ? std::min(E, std::max(mix.hot, K)) : E, 1.0);
  for (size_t e = 0; e < p.size() && mix.zipf > 0; ++e)
    p[e] = std::pow(static_cast<double>(e + 1), -mix.zipf);
  return drawn(T, K, p, seed);
}

}  // namespace v3b::ref
