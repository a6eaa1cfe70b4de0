// Loops over large tensors where OpenMP is not at hand.
#pragma once
#include <algorithm>
#include <atomic>
#include <cstdint>
#include <thread>
#include <vector>

namespace v3b::model {

// body(first, last) over [0, n) in chunks on all cores; chunks are handed out one by one. n <= chunk: no thread is made.
// The body must not throw.
template <class F>
void on_all_cores(int64_t n, int64_t chunk, const F& body) {
  const int64_t chunks = (n + chunk - 1) / chunk;
  std::atomic<int64_t> next{0};
  const auto work = [&] {
    for (int64_t c = next++; c < chunks; c = next++) body(c * chunk, std::min(n, (c + 1) * chunk));
  };
  const int64_t threads = std::min<int64_t>(
      {chunks, 64, static_cast<int64_t>(std::max(1U, std::thread::hardware_concurrency()))});
  std::vector<std::thread> pool;
  for (int64_t t = 1; t < threads; ++t) pool.emplace_back(work);
  work();
  for (std::thread& t : pool) t.join();
}

}  // namespace v3b::model
