// Routes with a chosen imbalance, for benchmarks and the expert-load scenario; they depend on the seed
// alone, not on the thread count.
#pragma once
#include <cstdint>
#include <vector>

namespace v3b::ref {

// At most one of the three differs from its default; uniform otherwise.
struct RouteMix {
  double zipf =
      0;  // > 0: expert i is drawn with probability ~ (i+1)^-zipf, K distinct experts a token
  int64_t hot = 0;   // > 0: uniform among the first max(hot, K) experts only
  double ratio = 0;  // >= 1: exact loads, expert 0 has ratio times the mean (at most T), the others
                     // share the rest
};                   //       evenly (1: perfectly balanced)

// idx [T, K], distinct within a token. K <= E.
std::vector<int32_t> synthetic_routes(int64_t T, int64_t E, int64_t K, const RouteMix& mix,
                                      uint64_t seed);

}  // namespace v3b::ref
