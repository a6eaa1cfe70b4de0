// Pooling of prompts: acceptance, step times, predicted and measured speed-up (SPEC 1.28).
#include <algorithm>
#include <cmath>

#include "reference/speculative.h"
#include "scenarios/mtp_decoding.h"

namespace v3b::scen {

double quantile(std::vector<double> v, double q) {
  if (v.empty()) return std::nan("");
  std::sort(v.begin(), v.end());
  const double x = q * static_cast<double>(v.size() - 1);
  const auto i = static_cast<size_t>(x);
  const double f = x - static_cast<double>(i);
  return i + 1 < v.size() ? v[i] * (1 - f) + v[i + 1] * f : v[i];
}

double break_even_acceptance(double cost, int64_t drafts) {
  if (!(cost > 1)) return 0;
  const double most = static_cast<double>(drafts) + 1;
  if (cost >= most) return cost - static_cast<double>(drafts);
  double low = 0, high = 1;
  for (int i = 0; i < 100; ++i) {
    const double mid = 0.5 * (low + high);
    (ref::tokens_per_step(mid, drafts) < cost ? low : high) = mid;
  }
  return 0.5 * (low + high);
}

MtpSummary summarize_mtp(const std::vector<const MtpPrompt*>& prompts) {
  MtpSummary s;
  std::vector<double> plain, rate, base, verify, draft, prefill, mtp_prefill;
  double plain_s = 0, spec_s = 0, plain_tokens = 0, distinct = 0;
  for (const MtpPrompt* p : prompts) {
    s.drafted.resize(std::max(s.drafted.size(), p->drafted.size()));
    s.accepted.resize(s.drafted.size());
    for (size_t k = 0; k < p->drafted.size(); ++k) {
      s.drafted[k] += p->drafted[k];
      s.accepted[k] += p->accepted[k];
    }
    ++s.prompts;
    s.emitted += p->emitted;
    s.steps += p->steps;
    s.near_ties += p->near_tie();
    s.mismatches += p->mismatch();
    s.identical += p->first_diff < 0;
    distinct += static_cast<double>(p->distinct);
    prefill.push_back(p->prefill_us);
    mtp_prefill.push_back(p->mtp_prefill_us);
    if (p->steps == 0 || p->plain_emitted == 0) continue;  // ended with the first token
    plain_s += p->plain_s;
    spec_s += p->s;
    plain_tokens += static_cast<double>(p->plain_emitted);
    plain.push_back(static_cast<double>(p->plain_emitted) / p->plain_s);
    rate.push_back(static_cast<double>(p->emitted) / p->s);
    base.push_back(p->base_us);
    verify.push_back(p->verify_us);
    draft.push_back(p->draft_us);
  }
  s.tokens_per_step = static_cast<double>(s.emitted) / static_cast<double>(s.steps);
  s.plain_q1 = quantile(plain, 0.25), s.plain_median = quantile(plain, 0.5);
  s.plain_q3 = quantile(plain, 0.75);
  s.q1 = quantile(rate, 0.25), s.median = quantile(rate, 0.5), s.q3 = quantile(rate, 0.75);
  s.base_us = quantile(base, 0.5), s.verify_us = quantile(verify, 0.5);
  s.draft_us = quantile(draft, 0.5);
  s.prefill_us = quantile(prefill, 0.5), s.mtp_prefill_us = quantile(mtp_prefill, 0.5);
  s.r_v = s.verify_us / s.base_us, s.r_d = s.draft_us / s.base_us;
  std::vector<double> alpha;
  for (size_t k = 0; k < s.drafted.size(); ++k)
    alpha.push_back(s.drafted[k] > 0
                        ? static_cast<double>(s.accepted[k]) / static_cast<double>(s.drafted[k])
                        : 0);
  s.predicted = ref::tokens_per_step(alpha) / (s.r_v + s.r_d);
  s.measured = (static_cast<double>(s.emitted) / spec_s) / (plain_tokens / plain_s);
  s.break_even = break_even_acceptance(s.r_v + s.r_d, static_cast<int64_t>(s.drafted.size()));
  s.distinct_share = distinct / static_cast<double>(s.emitted + s.prompts);
  return s;
}

}  // namespace v3b::scen
