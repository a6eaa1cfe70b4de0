#include "kernels/core/pass_team.h"

#include <omp.h>
#include <sys/resource.h>

#include <algorithm>
#include <chrono>

#include "kernels/core/cpu.h"

namespace v3b::kern {
namespace {

int64_t involuntary_switches() {
  rusage r{};
  return getrusage(RUSAGE_THREAD, &r) == 0 ? r.ru_nivcsw : 0;
}
int64_t now_ns() {
  return std::chrono::duration_cast<std::chrono::nanoseconds>(
             std::chrono::steady_clock::now().time_since_epoch())
      .count();
}

}  // namespace

void TeamChoice::passed(double us, int64_t switches) {
  if (alone()) {
    // Not the barriers' fault: a long pass beside other work. Its halves are worth their waits.
    if (us >= team_us_) {
      left_ = 0;
      ignore_ = kBackOff;
    } else if (--left_ == 0) {
      since_ = 0;
    }
    return;
  }
  ++since_;
  if (ignore_ > 0) {
    --ignore_;
    return;
  }
  if (switches < kTelling) return;
  span_ = since_ <= kFirst ? std::min(4 * span_, kMost) : kFirst;
  left_ = span_;
  team_us_ = us;
}

PassTeam::PassTeam(TeamChoice& choice, int64_t rows) : choice_(choice) {
  const int now = num_threads();
  if (rows != 1 || now < 2) return;
  threads_ = now;
  if (choice_.alone()) omp_set_num_threads(1);
  switches_ = involuntary_switches();
  begun_ns_ = now_ns();
}

PassTeam::~PassTeam() {
  if (threads_ == 0) return;
  const double us = 1e-3 * static_cast<double>(now_ns() - begun_ns_);
  const int64_t switches = involuntary_switches() - switches_;
  omp_set_num_threads(threads_);
  choice_.passed(us, switches);
}

}  // namespace v3b::kern
