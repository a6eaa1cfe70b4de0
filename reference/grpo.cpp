#include "reference/grpo.h"

#include <algorithm>
#include <cmath>
#include <string>

#include "model/error.h"

namespace v3b::ref {
namespace {

void require(bool ok, const char* what, const std::string& expected, const std::string& found) {
  if (!ok) throw Error(ExitCode::bad_input, what, "grpo", expected, found);
}

}  // namespace

std::vector<double> grpo_advantages(std::span<const double> rewards) {
  require(!rewards.empty(), "group of rewards", "at least one", "none");
  const double n = double(rewards.size());
  double mean = 0, var = 0;
  for (double r : rewards) {
    require(std::isfinite(r), "reward", "a finite number", std::to_string(r));
    mean += r;
  }
  mean /= n;
  for (double r : rewards) var += (r - mean) * (r - mean);
  const double std = std::sqrt(var / n);
  std::vector<double> a(rewards.size(), 0.0);
  // Equal rewards need not give an exact mean (0.1 three times): tested by themselves.
  const bool equal =
      std::all_of(rewards.begin(), rewards.end(), [&](double r) { return r == rewards[0]; });
  if (equal || std == 0) return a;
  for (size_t i = 0; i < a.size(); ++i) a[i] = (rewards[i] - mean) / std;
  return a;
}

Clipped grpo_clipped(double log_ratio, double advantage, double epsilon) {
  if (advantage == 0) return {};  // also where the ratio overflows
  const double rho = std::exp(log_ratio);
  const double first = rho * advantage;
  const double second = std::clamp(rho, 1 - epsilon, 1 + epsilon) * advantage;
  if (second < first) return {second, 0};
  return {first, first};  // d rho / d log pi = rho
}

double grpo_k3(double log_ratio) { return std::expm1(log_ratio) - log_ratio; }

GrpoResult grpo_token(std::span<const double> logp, std::span<const double> logp_old,
                      std::span<const double> logp_ref, std::span<const double> advantage,
                      std::span<const int64_t> lengths, const GrpoOptions& o) {
  require(!advantage.empty() && advantage.size() == lengths.size(), "outputs of a group",
          "one advantage a length, at least one",
          std::to_string(advantage.size()) + " and " + std::to_string(lengths.size()));
  require(o.epsilon > 0 && o.epsilon < 1, "epsilon", "0 < epsilon < 1", std::to_string(o.epsilon));
  require(o.beta >= 0, "beta", ">= 0", std::to_string(o.beta));
  size_t total = 0;
  for (int64_t n : lengths) {
    require(n >= 1, "length of an output", ">= 1", std::to_string(n));
    total += size_t(n);
  }
  require(logp.size() == total && logp_old.size() == total && logp_ref.size() == total,
          "log probabilities", std::to_string(total) + " of each policy",
          std::to_string(logp.size()) + ", " + std::to_string(logp_old.size()) + ", " +
              std::to_string(logp_ref.size()));
  GrpoResult r;
  r.grad.resize(total);
  size_t k = 0;
  for (size_t i = 0; i < lengths.size(); ++i) {
    const double weight = 1.0 / (double(lengths.size()) * double(lengths[i]));
    for (int64_t t = 0; t < lengths[i]; ++t, ++k) {
      const Clipped c = grpo_clipped(logp[k] - logp_old[k], advantage[i], o.epsilon);
      const double x = logp_ref[k] - logp[k];
      r.surrogate += weight * c.value;
      r.kl += weight * grpo_k3(x);
      r.grad[k] = weight * (c.grad + o.beta * std::expm1(x));
      if (advantage[i] != 0 && c.grad == 0) r.clipped_share += weight;
    }
  }
  r.objective = r.surrogate - o.beta * r.kl;
  return r;
}

GrpoResult grpo_sequence(std::span<const double> logp, std::span<const double> logp_old,
                         std::span<const double> logp_ref, std::span<const double> advantage,
                         const GrpoOptions& o) {
  const std::vector<int64_t> ones(advantage.size(), 1);
  return grpo_token(logp, logp_old, logp_ref, advantage, ones, o);
}

}  // namespace v3b::ref
