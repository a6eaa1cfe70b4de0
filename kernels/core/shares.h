// Units of work for a team: each thread has a contiguous run of its own (it reads the memory that it touched first, in
// order) and, when that is done, takes what is left of the others', so that a disturbed thread holds nobody up.
#pragma once
#include <algorithm>
#include <atomic>
#include <cstdint>

namespace v3b::kern {

class Shares {
 public:
  Shares(int64_t units, int threads) : parts_(parts_of(threads)) {
    for (int p = 0; p < parts_; ++p)
      part_[p] = {first(units, p, parts_), first(units, p + 1, parts_)};
  }
  // Part p of the team's parts_of() is the units [begin[p], begin[p + 1]).
  Shares(const int64_t* begin, int threads) : parts_(parts_of(threads)) {
    for (int p = 0; p < parts_; ++p) part_[p] = {begin[p], begin[p + 1]};
  }
  // f(unit) for every unit that this thread gets; each unit goes to one thread. All threads of the team call it.
  template <class F>
  void run(int thread, F&& f) {
    for (int i = 0; i < parts_; ++i) {
      Part& p = part_[(thread + i) % parts_];
      const std::atomic_ref<int64_t> next(p.next);
      while (next.load(std::memory_order_relaxed) < p.end) {
        const int64_t unit = next.fetch_add(1, std::memory_order_relaxed);
        if (unit < p.end) f(unit);
      }
    }
  }
  static int parts_of(int threads) { return std::clamp(threads, 1, kMost); }
  // Where part p of so many units begins: what a thread touches first, and then runs.
  static int64_t first(int64_t units, int p, int parts) { return units * p / parts; }

 private:
  static constexpr int kMost = 256;
  struct alignas(64) Part {
    int64_t next, end;
  };
  int parts_;
  Part part_[kMost];
};

}  // namespace v3b::kern
