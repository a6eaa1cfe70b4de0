// Does the sum of the parts explain the whole? The components of one forward pass of the CPU backend, each timed alone
// on its very operands, times how often the pass calls them, beside the pass itself (`v3bench closure`).
#pragma once
#include <string>
#include <vector>

#include "bench/ops/forward_common.h"

namespace v3b::bench {

// What happens between the repetitions of a component alone. nothing: its operands stay in the nearest caches. pass: the
// threads read as many bytes of their own as a pass reads and writes, so that the component finds its operands as far
// away as one pass after the other does. all: every cache is emptied, as by a pass of more bytes than they hold.
enum class Between { nothing, pass, all };

struct ClosureComponent {
  std::string component, shape;
  int64_t calls = 0;      // of one pass
  double median_us = 0;   // of one call, alone; over all repetitions of all its calls
  double total_us = 0;    // the calls' own medians added up
  double in_pass_us = 0;  // the same calls where they stand in the pass, medians added up
};
struct Closure {
  double pass_us = 0;  // median of whole passes
  int64_t passes = 0;
  Between between = Between::nothing;
  std::vector<ClosureComponent> components;  // most expensive first
  double explained_us() const;
  double in_pass_us() const;  // the rest of the pass is between the calls
  double rest_us() const { return pass_us - explained_us(); }
};

struct ClosureOptions {
  uint64_t seed = 1;
  int rounds = 15;       // each: some whole passes, then one pass in pieces
  int repetitions = 5;   // of a component in each round
  double seconds = 0.5;  // of whole passes, over all rounds; at least one a round
};
// Passes and pieces take turns. Does not check results: that is the caller's (law 6).
Closure measure_closure(const spec::ForwardShape& s, ForwardWhat what, const ClosureOptions& o);

}  // namespace v3b::bench
