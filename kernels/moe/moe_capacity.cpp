// Which slots an expert of limited capacity serves (SPEC 1.15). `slot` and `token` are one walk over
// T*K slots in priority order with a counter an expert. `prob` groups slots by expert (a counting
// sort) and selects the capacity's best of each overfull expert: linear on average, where sorting
// all gates would not be. A few ns a slot: small beside the rows that dispatch moves.
#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <vector>

#include "kernels/moe/moe.h"

namespace v3b::kern {
namespace {

// Orders floats as numbers (-0 like 0, NaN above all or below all), so that any input sorts.
int32_t order_key(float v) {
  const int32_t bits = std::bit_cast<int32_t>(v + 0.0F);
  return bits < 0 ? bits ^ 0x7fffffff : bits;
}

void keep_best(const spec::MoeCapacityArgs& a) {
  const int64_t slots = a.T * a.K;
  std::vector<int64_t> offsets(static_cast<size_t>(a.E) + 1), by_expert;
  for (int64_t i = 0; i < slots; ++i)
    if (a.idx[i] >= 0) ++offsets[static_cast<size_t>(a.idx[i]) + 1];
  for (size_t e = 0; e + 1 < offsets.size(); ++e) offsets[e + 1] += offsets[e];
  by_expert.resize(static_cast<size_t>(offsets.back()));
  std::vector<int64_t> next(offsets.begin(), offsets.end() - 1);
  for (int64_t i = 0; i < slots; ++i)
    if (a.idx[i] >= 0) by_expert[static_cast<size_t>(next[static_cast<size_t>(a.idx[i])]++)] = i;
  const auto better = [&](int64_t x, int64_t y) {  // larger gate, then earlier slot
    const int32_t kx = order_key(a.weight[x]), ky = order_key(a.weight[y]);
    return kx != ky ? kx > ky : x < y;
  };
  for (size_t e = 0; e + 1 < offsets.size(); ++e) {
    const auto first = by_expert.begin() + offsets[e], last = by_expert.begin() + offsets[e + 1];
    const int64_t served = std::min<int64_t>(last - first, a.capacity);
    if (served < last - first) std::nth_element(first, first + served, last, better);
    for (auto i = first; i != first + served; ++i) a.keep[*i] = 1;
  }
}

}  // namespace

int64_t moe_expert_capacity(double capacity_factor, int64_t K, int64_t T, int64_t E) noexcept {
  const double c = std::ceil(capacity_factor * static_cast<double>(K * T) / static_cast<double>(E));
  if (!(c < static_cast<double>(T * K))) return T * K;
  return std::max<int64_t>(1, static_cast<int64_t>(c));
}

void moe_capacity_cpu(const spec::MoeCapacityArgs& a) noexcept {
  const int64_t slots = a.T * a.K;
  std::memset(a.keep, 0, static_cast<size_t>(slots));
  if (a.drop_policy == spec::DropPolicy::prob) return keep_best(a);
  std::vector<int64_t> used(static_cast<size_t>(a.E));
  const auto serve = [&](int64_t i) {
    if (a.idx[i] < 0) return;
    int64_t& n = used[static_cast<size_t>(a.idx[i])];
    a.keep[i] = n < a.capacity;
    n += a.keep[i];
  };
  if (a.drop_policy == spec::DropPolicy::token) {
    for (int64_t i = 0; i < slots; ++i) serve(i);
    return;
  }
  for (int64_t k = 0; k < a.K; ++k)  // slot: all first choices, then all second ones, ...
    for (int64_t t = 0; t < a.T; ++t) serve(t * a.K + k);
}

}  // namespace v3b::kern
