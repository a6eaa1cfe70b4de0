// The verdict on one run: outputs against the reference, per element and by norm (law 2), routes
// with their allowed flips (law 5). Unproven is failed: an output without expected values fails,
// and so does NaN, of the output or of the reference itself.
#pragma once
#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "bench/harness/op.h"

namespace v3b::bench {

struct Verdict {
  bool passed = false;
  std::string reason;      // first failure; empty when passed
  double max_abs_err = 0;  // largest |got - expected|
  double max_rel_err = 0;  // largest |got - expected| / |expected| where |expected| >= rms / 1000
  double rel_fro_err = 0;  // worst of the outputs
  double err_over_bound =
      0;  // worst error in units of its bound, element or norm; <= 1 passes; inf: NaN or bound 0
  std::string worst_index;  // "y[12]" of err_over_bound's element
  int64_t route_flips = 0;  // rows whose routes differ within the allowed gap
  std::string note;  // rows judged if some flipped (over half: failed), elements if a sample is
  // Takes the worse of both (several outputs, several fills).
  void merge(const Verdict& other);
};

using ToleranceOf = std::function<Tolerance(const std::string& output)>;
Verdict judge(const Expected& expected, const std::vector<HostTensor*>& tensors,
              const ToleranceOf& tolerance);

}  // namespace v3b::bench
