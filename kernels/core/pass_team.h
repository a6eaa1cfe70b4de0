// How many threads a short pass gets on a machine that is not ours alone. Where another process has a core, the scheduler
// may put both spinning threads of a team on the other one, and leaves them there (two against one is as even as one
// against two): every barrier then lasts a slice, and a decode step of 0.17 ms lasts 150. One thread takes 0.23 ms.
#pragma once
#include <cstdint>

namespace v3b::kern {

// The decision alone, pass by pass. Involuntary switches of the calling thread within a pass are what tells: a short pass
// on a core of its own has none, on a core shared with another process at most one or two, in the state above one for
// every other barrier.
class TeamChoice {
 public:
  bool alone() const { return left_ > 0; }
  // After a pass of `us` microseconds with so many involuntary switches.
  void passed(double us, int64_t switches);

 private:
  static constexpr int64_t kTelling = 8;  // switches
  static constexpr int64_t kFirst = 256;  // passes alone before the team is tried again; four times
  static constexpr int64_t kMost = 8192;  // as many each time that it fails soon again
  static constexpr int64_t kBackOff = 4096;  // passes of a team that is no slower than one thread
  int64_t left_ = 0, span_ = kFirst, since_ = 0, ignore_ = 0;
  double team_us_ = 0;
};

// While it lives, the threads that `choice` wants; tells it what the pass took. Does nothing for passes of several rows,
// whose results could depend on the threads in the last bit, nor where the team is one thread anyway.
class PassTeam {
 public:
  PassTeam(TeamChoice& choice, int64_t rows);
  ~PassTeam();
  PassTeam(const PassTeam&) = delete;
  PassTeam& operator=(const PassTeam&) = delete;

 private:
  TeamChoice& choice_;
  int threads_ = 0;  // of the team; 0: not ours to choose
  int64_t switches_ = 0, begun_ns_ = 0;
};

}  // namespace v3b::kern
