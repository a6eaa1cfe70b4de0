// GRPO objective and its gradient (SPEC 1.31), plain double arithmetic on log probabilities.
#pragma once
#include <cstdint>
#include <span>
#include <vector>

namespace v3b::ref {

// A_i = (r_i - mean) / std of a group's rewards, population standard deviation; all 0 where the
// rewards are equal. Throws v3b::Error(bad_input) on an empty group or a reward not finite.
std::vector<double> grpo_advantages(std::span<const double> rewards);

// min(rho A, clip(rho, 1-eps, 1+eps) A) with rho = exp(log_ratio), log_ratio = log pi_theta -
// log pi_old. 0 for A = 0 at every ratio.
struct Clipped {
  double value = 0;
  double grad = 0;  // by log pi_theta: rho A where the first term is the smaller or equal, else 0
};
Clipped grpo_clipped(double log_ratio, double advantage, double epsilon);

// k3 estimate of KL(pi_theta || pi_ref): pi_ref/pi_theta - log(pi_ref/pi_theta) - 1 >= 0.
// log_ratio = log pi_ref - log pi_theta. Its gradient by log pi_theta is 1 - exp(log_ratio).
double grpo_k3(double log_ratio);

struct GrpoOptions {
  double epsilon = 0.2;  // clip range, in (0, 1)
  double beta = 0.04;    // weight of the KL term, >= 0
};
struct GrpoResult {
  double objective = 0;      // J, to be maximised: surrogate - beta * kl
  double surrogate = 0;      // mean of the clipped terms
  double kl = 0;             // mean of the k3 terms, without beta
  double clipped_share = 0;  // share of terms whose ratio gets no gradient from the surrogate
  std::vector<double> grad;  // dJ / d log pi_theta, one for each log probability given
};

// Sequence level, as [TR] writes it: one log probability an output, all spans [G].
GrpoResult grpo_sequence(std::span<const double> logp, std::span<const double> logp_old,
                         std::span<const double> logp_ref, std::span<const double> advantage,
                         const GrpoOptions& o = {});
// Token level, as in DeepSeekMath: (1/G) sum_i 1/|o_i| sum_t [...], the advantage of output i at
// each of its tokens. logp... [sum of lengths], outputs one after another; lengths [G], each >= 1.
GrpoResult grpo_token(std::span<const double> logp, std::span<const double> logp_old,
                      std::span<const double> logp_ref, std::span<const double> advantage,
                      std::span<const int64_t> lengths, const GrpoOptions& o = {});
// Both throw v3b::Error(bad_input) where sizes disagree or options are out of range.

}  // namespace v3b::ref
