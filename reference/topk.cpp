#include "reference/topk.h"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <vector>

namespace v3b::ref {

template <class S>
void topk_select(int64_t T, int64_t E, int64_t K, const S* s, int32_t* idx, S* values) {
  std::vector<int32_t> order(E);
  for (int64_t t = 0; t < T; ++t) {
    const S* row = s + t * E;
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(), [row](int32_t a, int32_t b) {
      if (std::isnan(row[a]) || std::isnan(row[b]))
        return !std::isnan(row[a]) && std::isnan(row[b]);
      return row[a] > row[b];
    });
    for (int64_t k = 0; k < K; ++k) {
      idx[t * K + k] = order[k];
      if (values != nullptr) values[t * K + k] = row[order[k]];
    }
  }
}

template <class S>
void topk_backward_values(int64_t T, int64_t E, int64_t K, const int32_t* idx, const S* dvalues,
                          S* ds) {
  std::fill(ds, ds + T * E, S(0));
  for (int64_t t = 0; t < T; ++t)
    for (int64_t k = 0; k < K; ++k) ds[t * E + idx[t * K + k]] = dvalues[t * K + k];
}

template <class S>
void topk_backward(int64_t T, int64_t E, int64_t K, const int32_t* idx, const S* dy, S* ds,
                   bool ste) {
  if (ste) {
    std::copy(dy, dy + T * E, ds);
    return;
  }
  std::fill(ds, ds + T * E, S(0));
  for (int64_t t = 0; t < T; ++t)
    for (int64_t k = 0; k < K; ++k) ds[t * E + idx[t * K + k]] = dy[t * E + idx[t * K + k]];
}

#define V3B_INSTANTIATE(S)                                                                        \
  template void topk_select<S>(int64_t, int64_t, int64_t, const S*, int32_t*, S*);                \
  template void topk_backward_values<S>(int64_t, int64_t, int64_t, const int32_t*, const S*, S*); \
  template void topk_backward<S>(int64_t, int64_t, int64_t, const int32_t*, const S*, S*, bool);
V3B_INSTANTIATE(float)
V3B_INSTANTIATE(double)

}  // namespace v3b::ref
