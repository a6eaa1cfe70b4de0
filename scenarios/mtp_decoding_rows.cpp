// Columns of mtp_decoding.csv and the rows of single prompts, out and in again.
#include <cmath>
#include <sstream>

#include "scenarios/mtp_decoding.h"

namespace v3b::scen {

const std::vector<std::string> kMtpColumns = {
    "kind", "model", "weights", "backend", "prompt_set", "prompt_tokens", "max_new", "decoding",
    "temperature", "top_p", "drafts", "forced_acceptance", "domain", "document", "prompt",
    "prompts", "position",
    // acceptance
    "drafted", "accepted", "acceptance", "acceptance_low", "acceptance_high", "expected_acceptance",
    // tokens and time
    "steps", "emitted", "tokens_per_step", "distinct_share", "plain_emitted", "plain_s",
    "speculative_s", "plain_q1_tokens_s", "plain_median_tokens_s", "plain_q3_tokens_s",
    "speculative_q1_tokens_s", "speculative_median_tokens_s", "speculative_q3_tokens_s", "base_us",
    "verify_us", "draft_us", "prefill_us", "mtp_prefill_us", "verify_over_base", "draft_over_base",
    "predicted_speedup", "measured_speedup", "break_even_acceptance",
    // identity
    "identical_prompts", "near_ties", "mismatches", "first_difference", "difference_margin",
    "params", "status", "reason"};
const std::vector<std::string> kMtpKeys = {
    "kind",     "weights",     "backend", "prompt_set", "prompt_tokens",     "max_new",
    "decoding", "temperature", "top_p",   "drafts",     "forced_acceptance", "domain",
    "document", "prompt",      "position"};

namespace {

std::string join(const std::vector<int64_t>& v) {
  std::string s;
  for (const int64_t x : v) s += (s.empty() ? "" : " ") + std::to_string(x);
  return s;
}
std::vector<int64_t> split(const std::string& s) {
  std::istringstream in(s);
  std::vector<int64_t> v;
  for (int64_t x; in >> x;) v.push_back(x);
  return v;
}

}  // namespace

void set_mtp_prompt(rep::Record& r, const MtpPrompt& p) {
  r.set("drafted", join(p.drafted)).set("accepted", join(p.accepted));
  r.set("steps", p.steps).set("emitted", p.emitted).set("plain_emitted", p.plain_emitted);
  if (p.steps > 0)
    r.set("tokens_per_step", static_cast<double>(p.emitted) / static_cast<double>(p.steps));
  r.set("distinct_share", static_cast<double>(p.distinct) / static_cast<double>(p.emitted + 1));
  r.set("plain_s", p.plain_s).set("speculative_s", p.s).set("base_us", p.base_us);
  r.set("verify_us", p.verify_us).set("draft_us", p.draft_us);
  r.set("prefill_us", p.prefill_us).set("mtp_prefill_us", p.mtp_prefill_us);
}
// Greedy only.
void set_mtp_identity(rep::Record& r, const MtpPrompt& p) {
  r.set("identical_prompts", int64_t{p.first_diff < 0}).set("near_ties", int64_t{p.near_tie()});
  r.set("mismatches", int64_t{p.mismatch()});
  if (p.first_diff >= 0)
    r.set("first_difference", p.first_diff).set("difference_margin", p.diff_margin);
  if (p.mismatch())
    r.set("status", "failed").set("reason", "other tokens than plain decoding, and no near-tie");
}
MtpPrompt mtp_prompt_from_row(const rep::CsvTable& t, size_t i) {
  const auto number = [&](const char* c) { return t.number(i, c).value_or(0); };
  const auto integer = [&](const char* c) { return static_cast<int64_t>(number(c)); };
  MtpPrompt p;
  p.domain = t.cell(i, "domain"), p.document = t.cell(i, "document");
  p.prompt = integer("prompt");
  p.drafted = split(t.cell(i, "drafted")), p.accepted = split(t.cell(i, "accepted"));
  p.steps = integer("steps"), p.emitted = integer("emitted");
  p.plain_emitted = integer("plain_emitted");
  p.distinct = std::llround(number("distinct_share") * static_cast<double>(p.emitted + 1));
  p.plain_s = number("plain_s"), p.s = number("speculative_s");
  p.base_us = number("base_us"), p.verify_us = number("verify_us");
  p.draft_us = number("draft_us");
  p.prefill_us = number("prefill_us"), p.mtp_prefill_us = number("mtp_prefill_us");
  if (!t.cell(i, "first_difference").empty()) {
    p.first_diff = integer("first_difference");
    p.diff_margin = t.number(i, "difference_margin").value_or(std::nan(""));  // unproven
  }
  return p;
}

}  // namespace v3b::scen
