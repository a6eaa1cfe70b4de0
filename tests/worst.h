// The largest of some errors, for a bound that is checked once. std::max(worst, error) drops a NaN; here it
// becomes infinity and stays, so that every bound fails.
#pragma once
#include <cmath>
#include <limits>

namespace v3b {

inline double worse(double worst, double error) {
  if (std::isnan(error) || std::isnan(worst)) return std::numeric_limits<double>::infinity();
  return error > worst ? error : worst;
}

}  // namespace v3b
