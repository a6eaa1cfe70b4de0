// Speculative decoding in plain double arithmetic (SPEC 1.28): distributions, acceptance, residual,
// rates.
#pragma once
#include <cstdint>
#include <span>
#include <vector>

#include "reference/spec/speculative.h"

namespace v3b::ref {

// Softmax of logits / temperature, cut to the smallest set of largest probabilities whose sum
// reaches top_p (the one that crosses the mark stays; ties to the lower id), renormalised.
// temperature > 0, 0 < top_p <= 1.
std::vector<double> sampling_distribution(std::span<const float> logits, double temperature,
                                          double top_p);
// Index of the largest value; ties to the lower index.
int32_t argmax(std::span<const float> v);
int32_t argmax(std::span<const double> v);
// First index whose cumulative probability exceeds u * sum(p); never an index of probability 0.
int32_t sample(std::span<const double> p, double u);

// beta = sum min(p, q) = 1 - total variation: the chance that a draft from q is accepted.
double acceptance_rate(std::span<const double> p, std::span<const double> q);
// (p - q)+ / sum (p - q)+; p itself where p <= q everywhere (then it is never sampled).
std::vector<double> residual(std::span<const double> p, std::span<const double> q);

struct Accepted {
  int64_t count = 0;  // drafts accepted
  int32_t next = 0;   // the token after them: residual sample, or bonus if all were accepted
};
// p: gamma + 1 target distributions; q: gamma draft distributions, an empty span entry = one-hot at
// the draft. uniform: gamma + 1 numbers in [0, 1).
Accepted accept_sampled(std::span<const std::vector<double>> p,
                        std::span<const std::vector<double>> q, std::span<const int32_t> draft,
                        std::span<const double> uniform);
// best: argmax of each of the gamma + 1 target rows.
Accepted accept_greedy(std::span<const int32_t> best, std::span<const int32_t> draft);
// The batched form that kernels/mtp implements; same results on the same floats.
void mtp_accept(const spec::MtpAcceptArgs& a);

// Mean tokens a step 1 + sum_k prod_{j<=k} alpha_j for conditional acceptance rates alpha.
double tokens_per_step(std::span<const double> alpha);
// The same for gamma equal rates: (1 - alpha^(gamma+1)) / (1 - alpha).
double tokens_per_step(double alpha, int64_t gamma);
// tau t_1 / (t_verify + gamma t_draft).
double speedup(double tau, double t_base, double t_verify, double t_draft, int64_t gamma);
// The alpha at which speculation breaks even for gamma = 1: r_v + r_d - 1.
double break_even(double t_base, double t_verify, double t_draft);

}  // namespace v3b::ref
