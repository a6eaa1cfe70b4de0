// Sliding-window perplexity in both definitions (SPEC 1.29). Windows begin at 0, S, 2S, ... and
// cover [b, min(b+W, N)); a window scores only the tokens that no earlier window scored; the first
// scores all (a BOS stands before every window, so its first token has a prediction too).
#pragma once
#include <cstdint>
#include <functional>
#include <vector>

#include "reference/spec/flags.h"

namespace v3b::ref {

struct PplWindow {
  int64_t begin, end;    // tokens in the window
  int64_t first_scored;  // tokens [first_scored, end) count
};
// N tokens, window W, stride S; 1 <= S <= W, else Error(usage): S > W would leave tokens unscored.
std::vector<PplWindow> ppl_windows(int64_t N, int64_t W, int64_t S);

struct PplResult {
  double token_mean_nll = 0;  // sum of all NLL / N
  double window_mean_nll =
      0;  // unweighted mean over windows of the window's mean NLL (YaRN's script)
  double nll_sum = 0;
  int64_t tokens = 0, windows = 0;
  double ppl(spec::PplDef def) const;  // exp of the chosen mean
  double bits_per_token() const;
  double bits_per_byte(int64_t bytes) const;  // nll_sum / (ln 2 * bytes)
};

// nll(begin, end) returns the end-begin losses of tokens begin..end-1 when the context starts at
// begin.
PplResult sliding_perplexity(int64_t N, int64_t W, int64_t S,
                             const std::function<std::vector<double>(int64_t, int64_t)>& nll);

}  // namespace v3b::ref
