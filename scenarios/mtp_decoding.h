// What the MTP module is worth in decoding (SPEC 1.25, 1.28, 1.32): how many of its drafts the
// model accepts, what a step costs with and without it, the speed-up that follows and the one that
// is measured, and whether the emitted tokens are the same. Writes mtp_decoding.csv; columns in
// reports/README.md.
#pragma once
#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "scenarios/common.h"

namespace v3b::scen {

// Empty lists and zeros take the defaults of --quick or --full.
struct MtpOptions : CommonOptions {
  std::vector<int64_t> drafts;       // tokens drafted a step; above 1 the module is recycled
  std::vector<double> temperatures;  // of sampled decoding, beside greedy
  double top_p = 0.95;
  int64_t prompts = 0;         // a domain
  int64_t prompt_tokens = 0;   // bos included
  int64_t max_new = 0;         // tokens emitted for a prompt
  std::vector<double> forced;  // acceptance probabilities of the draft oracle, one draft a step
  int64_t forced_prompts = 0;  // of all domains together
  int64_t text_tokens = 0;     // held-out tokens a domain on which drafts are compared with the
                               // model's own choice after the same text
};

// Throws v3b::Error. Returns an exit code of DESIGN 4: 1 when greedy speculative decoding emitted
// other tokens than plain decoding and the difference was no near-tie.
int run_mtp_decoding(const MtpOptions& o);

// ---- parts, for tests
// --------------------------------------------------------------------------------------
inline constexpr double kNearTie = 1e-2;  // margin / RMS below which a flip is a tie (SPEC 1.28)

// One prompt decoded plainly and speculatively.
struct MtpPrompt {
  std::string domain, document;
  int64_t prompt = 0;
  std::vector<int64_t> drafted, accepted;             // by draft position
  int64_t plain_emitted = 0, emitted = 0, steps = 0;  // after prefill's token
  double plain_s = 0, s = 0;                          // sums of whole steps
  double base_us = 0, verify_us = 0, draft_us = 0;    // medians: main forward of 1 token, of
                                                      // drafts + 1 tokens, all MTP work of a step
  double prefill_us = 0, mtp_prefill_us = 0;
  int64_t distinct = 0;     // different tokens among the emitted
  int64_t first_diff = -1;  // greedy: first emitted token that differs from plain decoding
  double diff_margin = 0;   // (largest - second logit) / RMS of plain decoding there
  bool near_tie() const { return first_diff >= 0 && diff_margin < kNearTie; }
  bool mismatch() const { return first_diff >= 0 && !(diff_margin < kNearTie); }
};

// Figures of many prompts. Counts are summed, times are medians of the prompts' medians, rates are
// the quartiles over prompts; the measured speed-up compares total tokens per total time.
struct MtpSummary {
  std::vector<int64_t> drafted, accepted;
  int64_t prompts = 0, emitted = 0, steps = 0, identical = 0, near_ties = 0, mismatches = 0;
  double tokens_per_step = 0;                           // counted
  double plain_q1 = 0, plain_median = 0, plain_q3 = 0;  // tokens/s
  double q1 = 0, median = 0, q3 = 0;
  double base_us = 0, verify_us = 0, draft_us = 0, prefill_us = 0, mtp_prefill_us = 0;
  double r_v = 0, r_d = 0;  // in units of base_us
  double predicted = 0;     // tau / (r_v + r_d), tau from the acceptance by position
  double measured = 0;
  double break_even =
      0;  // equal acceptance at every position where tau = r_v + r_d; above 1: never
  double distinct_share = 0;
};
// Columns, key columns, and what a row of one prompt holds.
extern const std::vector<std::string> kMtpColumns, kMtpKeys;
void set_mtp_prompt(rep::Record& r, const MtpPrompt& p);
void set_mtp_identity(rep::Record& r, const MtpPrompt& p);  // greedy
MtpPrompt mtp_prompt_from_row(const rep::CsvTable& t, size_t i);

MtpSummary summarize_mtp(const std::vector<const MtpPrompt*>& prompts);
double quantile(std::vector<double> v, double q);  // linear between order statistics; NaN if empty
// alpha with tokens_per_step(alpha, drafts) = cost; above 1 when even full acceptance is too little
// (then cost - drafts, a number that only says how far off), 0 when cost <= 1.
double break_even_acceptance(double cost, int64_t drafts);

}  // namespace v3b::scen
