// LM head and cross-entropy in row chunks, so that the logits of all tokens never stand in memory
// at once (SPEC 1.29, 3.8). Internal to kernels/train.
#pragma once
#include "kernels/train/ops.h"

namespace v3b::kern::train {

inline constexpr int64_t kHeadChunk = 512;  // rows of logit gradients kept (bf16)
inline constexpr int64_t kHeadRows = 64;    // rows of logits at a time: they stay in the L2 cache

template <class R, class X>
struct HeadScratch {
  Buffer<R> logits;  // [kHeadRows, V]
  Buffer<X> dlogits;
  std::vector<double> nats;
};

// Sum of nats over rows with target[i] >= 0. argmax [N] (or null). With backward (dh not null):
// dh [N,d] = gradient times `weight`, dw += .
template <class R, class X>
double head_loss(int64_t N, int64_t d, int64_t V, const X* x, const X* w, const int32_t* target,
                 double weight, int32_t* argmax, R* dh, R* dw, HeadScratch<R, X>& t) {
  const int64_t chunk = std::min(N, kHeadChunk);
  t.logits.reserve_discard(std::min(N, kHeadRows) * V);
  if (dh != nullptr) t.dlogits.reserve_discard(chunk * V);
  t.nats.assign(static_cast<size_t>(N), 0.0);
  for (int64_t r0 = 0; r0 < N; r0 += chunk) {
    const int64_t rows = std::min(chunk, N - r0);
    for (int64_t s0 = 0; s0 < rows; s0 += kHeadRows) {
      const int64_t n = std::min(kHeadRows, rows - s0), at = r0 + s0;
      mm_fwd(n, V, d, x + at * d, w, t.logits.data());
#pragma omp parallel for schedule(static)
      for (int64_t i = 0; i < n; ++i) {
        R* z = t.logits.data() + i * V;
        const int32_t y = target[at + i];
        R mx = z[0], sum = 0;
#pragma omp simd reduction(max : mx)
        for (int64_t j = 0; j < V; ++j) mx = std::max(mx, z[j]);
        if (argmax != nullptr) {
          int64_t j = 0;
          while (j + 1 < V && !(z[j] == mx)) ++j;
          argmax[at + i] = static_cast<int32_t>(j);
        }
        const R zy = y >= 0 ? z[y] : R(0);
#pragma omp simd reduction(+ : sum)
        for (int64_t j = 0; j < V; ++j) {
          z[j] = exp_of(z[j] - mx);
          sum += z[j];
        }
        if (y >= 0)
          t.nats[static_cast<size_t>(at + i)] = static_cast<double>(mx + std::log(sum) - zy);
        if (dh == nullptr) continue;
        X* g = t.dlogits.data() + (s0 + i) * V;
        if (y < 0) {
          std::fill(g, g + V, X{});
          continue;
        }
        const R k = R(weight) / sum;
#pragma omp simd
        for (int64_t j = 0; j < V; ++j) g[j] = st<X>(z[j] * k);
        g[y] = st<X>(z[y] * k - R(weight));
      }
    }
    if (dh == nullptr) continue;
    mm_dx(rows, V, d, t.dlogits.data(), w, dh + r0 * d);
    mm_dw(rows, V, d, t.dlogits.data(), x + r0 * d, dw);
  }
  double sum = 0;
  for (double v : t.nats) sum += v;
  return sum;
}

}  // namespace v3b::kern::train
