#include "kernels/core/team.h"

#include <strings.h>

#include <algorithm>
#include <cstdlib>

#include "kernels/core/cpu.h"

namespace v3b::kern {
namespace {

// What one thread does in a microsecond on small operands: near 25 GB/s from the caches with the
// loops' heads and tails, near 100 GFLOP/s in short products.
constexpr double kBytesPerUs = 25e3, kFlopPerUs = 100e3;

// What limits a team: its members have to notice the work. Spinning ones (OMP_WAIT_POLICY=active
// and the default, for some milliseconds after the last region) see it after a few cache misses;
// sleeping ones (passive) need a futex call and a turn of the scheduler at both ends.
constexpr double kSpinningUs = 5, kSleepingUs = 50;

double wake_us() {
  static const double us = [] {
    const char* policy = std::getenv("OMP_WAIT_POLICY");
    return policy != nullptr && strcasecmp(policy, "passive") == 0 ? kSleepingUs : kSpinningUs;
  }();
  return us;
}

}  // namespace

int team_for(double bytes, double flop) {
  // A second thread saves at most half of the time of the first.
  const double us = std::max(bytes / kBytesPerUs, flop / kFlopPerUs);
  return us < 2 * wake_us() ? 1 : num_threads();
}

}  // namespace v3b::kern
