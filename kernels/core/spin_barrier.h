// One meeting of a team inside a parallel region, for phases of equal length: OpenMP's own barrier puts the early thread
// to sleep (OMP_WAIT_POLICY=passive), and its wake costs some 50 us.
#pragma once
#include <atomic>
#include <thread>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace v3b::kern {

class SpinBarrier {  // used once; what was written before it is seen by all after it
 public:
  void wait(int team) {
    arrived_.fetch_add(1, std::memory_order_acq_rel);
    for (int spins = 0; arrived_.load(std::memory_order_acquire) < team; ++spins) {
      if (spins >= kSpins) {
        std::this_thread::yield();  // more threads than cores
        continue;
      }
#if defined(__x86_64__)
      _mm_pause();
#endif
    }
  }

 private:
  static constexpr int kSpins = 10000;  // about 0.2 ms
  std::atomic<int> arrived_ = 0;
};

}  // namespace v3b::kern
