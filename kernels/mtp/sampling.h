// The pure parts of acceptance and sampling (SPEC 1.28), host and device: what the CUDA kernels decide with, and what the
// unit tests run on the host.
#pragma once
#include <bit>
#include <cstdint>

#include "reference/spec/speculative.h"

namespace v3b::kern {

// Drafts of sequence b that survive the tests u < p / q (written without the division), 0..gamma. Sampling only.
V3B_HD int64_t accepted_drafts(const spec::MtpAcceptArgs& a, int64_t b) {
  int64_t k = 0;
  for (; k < a.gamma; ++k) {
    const int64_t at = b * a.gamma + k;
    const int32_t draft = a.draft[at];
    const double q = a.q != nullptr ? static_cast<double>(a.q[at * a.V + draft]) : 1.0;
    const double p = static_cast<double>(a.p[(b * (a.gamma + 1) + k) * a.V + draft]);
    if (!(a.uniform[b * (a.gamma + 1) + k] * q < p && q > 0)) break;
  }
  return k;
}
// (p - q)+ of one entry; q null: a one-hot draft.
V3B_HD double residual_weight(float p, const float* q, int64_t i, int64_t one_hot) {
  const double qi = q != nullptr ? static_cast<double>(q[i]) : i == one_hot ? 1.0 : 0.0;
  const double r = static_cast<double>(p) - qi;
  return r > 0 ? r : 0.0;
}

// Top-p by counts instead of sorting: masses are integers, so that sums do not depend on their order.
inline constexpr double kSamplingUnit = 0x1p43;                 // of a mass; weights are at most 1
inline constexpr int64_t kSamplingMaxVocab = int64_t{1} << 20;  // sums are at most 2^63
V3B_HD uint64_t sampling_mass(float weight) {                   // of a weight in [0, 1]
  return static_cast<uint64_t>(static_cast<double>(weight) * kSamplingUnit);
}
// The mass that the kept set must reach.
V3B_HD uint64_t sampling_target(double top_p, uint64_t total) {
  const double t = top_p * static_cast<double>(total);
  const uint64_t floor = static_cast<uint64_t>(t);
  const uint64_t up = static_cast<double>(floor) < t ? floor + 1 : floor;
  return up < 1 ? 1 : up > total ? total : up;
}

// Where the largest weights reach the target, digit by digit of their bits (8 bits a round, highest first).
struct TopPSearch {
  uint32_t prefix = 0;  // bits found so far, in place
  uint64_t above = 0;   // mass of the weights that are larger in these bits
};
inline constexpr int kTopPRounds = 4;
V3B_HD int top_p_shift(int round) { return 24 - 8 * round; }
// Does the weight share the bits found before this round?
V3B_HD bool top_p_candidate(const TopPSearch& s, int round, uint32_t bits) {
  return round == 0 || ((bits ^ s.prefix) >> (top_p_shift(round) + 8)) == 0;
}
V3B_HD int top_p_digit(int round, uint32_t bits) {
  return static_cast<int>(bits >> top_p_shift(round) & 0xffu);
}
// The search goes on in the bucket where the sum from the top reaches the target. mass [256] of the candidates.
// `masses_above`: what buckets higher than `from` hold; looks at from, from - 1, ... down to `to`. False: not reached.
V3B_HD bool top_p_step(TopPSearch& s, int round, const unsigned long long* mass, int from, int to,
                       uint64_t masses_above, uint64_t target) {
  uint64_t sum = s.above + masses_above;
  for (int d = from; d >= to; --d) {
    if (sum + mass[d] >= target) {
      s.above = sum;
      s.prefix |= static_cast<uint32_t>(d) << top_p_shift(round);
      return true;
    }
    sum += mass[d];
  }
  return false;
}
// After the last round: weights above the threshold stay, and `ties` of those equal to it, lowest ids first.
struct TopPCut {
  uint32_t threshold;  // bits
  int64_t ties;
  double scale;  // 1 / kept weight: what a kept weight is multiplied with
};
V3B_HD TopPCut top_p_cut(const TopPSearch& s, uint64_t target) {
  const uint64_t each = sampling_mass(std::bit_cast<float>(s.prefix));
  const uint64_t missing = target > s.above ? target - s.above : 0;
  const uint64_t ties = each == 0 ? 0 : (missing + each - 1) / each;
  return {s.prefix, static_cast<int64_t>(ties),
          kSamplingUnit / static_cast<double>(s.above + ties * each)};
}

}  // namespace v3b::kern
