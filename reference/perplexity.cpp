#include "reference/perplexity.h"

#include <algorithm>
#include <cmath>
#include <string>

#include "model/error.h"

namespace v3b::ref {

std::vector<PplWindow> ppl_windows(int64_t N, int64_t W, int64_t S) {
  if (S < 1 || W < S) {
    throw Error(ExitCode::usage, "stride of sliding windows", "perplexity", "1 <= stride <= window",
                "stride " + std::to_string(S) + ", window " + std::to_string(W));
  }
  std::vector<PplWindow> out;
  int64_t scored = 0;
  for (int64_t b = 0; scored < N; b += S) {
    const int64_t end = std::min(b + W, N);
    out.push_back({b, end, scored});
    scored = end;
  }
  return out;
}

double PplResult::ppl(spec::PplDef def) const {
  return std::exp(def == spec::PplDef::token_mean ? token_mean_nll : window_mean_nll);
}
double PplResult::bits_per_token() const { return token_mean_nll / std::log(2.0); }
double PplResult::bits_per_byte(int64_t bytes) const {
  return nll_sum / (std::log(2.0) * static_cast<double>(bytes));
}

PplResult sliding_perplexity(int64_t N, int64_t W, int64_t S,
                             const std::function<std::vector<double>(int64_t, int64_t)>& nll) {
  PplResult r;
  double sum_of_means = 0;
  for (const PplWindow& w : ppl_windows(N, W, S)) {
    const std::vector<double> losses = nll(w.begin, w.end);
    if (static_cast<int64_t>(losses.size()) != w.end - w.begin) {
      throw Error(ExitCode::bad_input, "number of losses in a window", "perplexity",
                  std::to_string(w.end - w.begin), std::to_string(losses.size()));
    }
    double sum = 0;
    for (int64_t i = w.first_scored; i < w.end; ++i) sum += losses[i - w.begin];
    r.nll_sum += sum;
    r.tokens += w.end - w.first_scored;
    sum_of_means += sum / static_cast<double>(w.end - w.first_scored);
    ++r.windows;
  }
  if (r.windows > 0) {
    r.token_mean_nll = r.nll_sum / static_cast<double>(r.tokens);
    r.window_mean_nll = sum_of_means / static_cast<double>(r.windows);
  }
  return r;
}

}  // namespace v3b::ref
