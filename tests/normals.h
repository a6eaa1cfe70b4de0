// Normally distributed values, the same on every run.
#pragma once
#include <cstdint>
#include <random>
#include <vector>

namespace v3b {

template <class S = double>
std::vector<S> normals(int64_t n, uint64_t seed, double std = 1.0) {
  std::mt19937_64 rng(seed);
  std::normal_distribution<double> normal(0.0, std);
  std::vector<S> v(static_cast<size_t>(n));
  for (S& x : v) x = static_cast<S>(normal(rng));
  return v;
}

}  // namespace v3b
