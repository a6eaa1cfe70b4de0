// How many threads a parallel region is worth. Waking a team costs the same whatever it then does;
// a decode step of a small model is some dozens of regions of a few microseconds each.
#pragma once
#include <cstdint>

namespace v3b::kern {

// Threads for a region that moves `bytes` and computes `flop` in all: num_threads(), or 1 where one
// thread is done about as soon as a team would have been woken (and always 1 inside a parallel
// region). Depends on its arguments, the thread limit and OMP_WAIT_POLICY only.
int team_for(double bytes, double flop);

}  // namespace v3b::kern
