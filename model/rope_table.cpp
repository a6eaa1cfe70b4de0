// SPEC 1.3 and 1.4: frequencies of every context extension, in float64.
#include "model/rope_table.h"

#include <algorithm>
#include <cmath>

namespace v3b::model {

namespace {

constexpr double kPi = 3.14159265358979323846;

struct Rope {
  int64_t half;    // d_r/2
  double base, L;  // original context

  double theta(int64_t i, double b) const {
    return std::pow(b, -static_cast<double>(i) / static_cast<double>(half));
  }
  double theta(int64_t i) const { return theta(i, base); }
  // base * x^(d_r/(d_r-2)): the last pair's theta is divided by exactly x (1.4.2).
  double ntk_base(double x) const {
    const double d = 2.0 * static_cast<double>(half);
    return base * std::pow(x, d / (d - 2));
  }
};

// 1.4.4: share of the unscaled frequency, by rotations inside L.
double paper_keep(const Rope& r, int64_t i, const RopeScaling& s) {
  const double turns = r.L * r.theta(i) / (2 * kPi);
  if (turns < s.beta_slow) return 0;
  if (turns >= s.beta_fast) return 1;  // also the step when both betas are equal
  return (turns - s.beta_slow) / (s.beta_fast - s.beta_slow);
}

// 1.4.5: the same, linear in the pair index between integer corners.
double index_keep(const Rope& r, int64_t i, const RopeScaling& s) {
  const double d = 2.0 * static_cast<double>(r.half);
  auto corr = [&](double turns) {
    return d * std::log(r.L / (2 * kPi * turns)) / (2 * std::log(r.base));
  };
  const double low = std::max(std::floor(corr(s.beta_fast)), 0.0);
  double high = std::min(std::ceil(corr(s.beta_slow)), d - 1);
  if (low == high) high += 0.001;
  const double ramp = std::clamp((static_cast<double>(i) - low) / (high - low), 0.0, 1.0);
  return 1 - ramp;
}

}  // namespace

double yarn_get_mscale(double s, double a) { return s <= 1 ? 1.0 : 0.1 * a * std::log(s) + 1.0; }

RopeFreqs rope_freqs(const ModelConfig& c, const spec::Flags& flags, int64_t context) {
  const RopeScaling& s = c.rope_scaling;
  const int64_t original = s.original_max_position_embeddings > 0
                               ? s.original_max_position_embeddings
                               : c.max_position_embeddings;
  const Rope r{c.qk_rope_head_dim / 2, c.rope_theta, static_cast<double>(original)};
  RopeFreqs f;
  f.softmax_scale = 1.0 / std::sqrt(static_cast<double>(c.qk_head_dim()));
  f.inv_freq.resize(static_cast<size_t>(r.half));
  for (int64_t i = 0; i < r.half; ++i) f.inv_freq[static_cast<size_t>(i)] = r.theta(i);
  const bool off = flags.yarn_when == spec::YarnWhen::only_if_ctx_gt_orig && context <= original;
  if (s.type == RopeType::none || off) return f;

  const double ratio = static_cast<double>(context) / r.L;  // l/L
  double factor = s.factor;
  if (s.type == RopeType::yarn && s.dynamic) factor = std::max(1.0, ratio);
  for (int64_t i = 0; i < r.half; ++i) {
    double& theta = f.inv_freq[static_cast<size_t>(i)];
    switch (s.type) {
      case RopeType::none:
        break;
      case RopeType::linear:
        theta /= factor;
        break;
      case RopeType::ntk:
        theta = r.theta(i, r.ntk_base(factor));
        break;
      case RopeType::dynamic:  // factor is alpha; 1 gives the paper's s = max(1, l/L)
        if (ratio > 1) theta = r.theta(i, r.ntk_base(factor * ratio - (factor - 1)));
        break;
      case RopeType::ntk_by_parts:
      case RopeType::yarn: {
        const bool paper =
            s.type == RopeType::ntk_by_parts || flags.yarn_ramp == spec::YarnRamp::paper;
        const double keep = paper ? paper_keep(r, i, s) : index_keep(r, i, s);
        theta = theta / factor * (1 - keep) + theta * keep;
        break;
      }
    }
  }
  // Temperature, 1.4.6. cos and sin: an explicit attention_factor wins; DeepSeek's ratio when both
  // mscales are given; original YaRN otherwise. The softmax gains get(s, mscale_all_dim)^2 for
  // every scaling that names it, as the published modelling code does.
  if (!s.temperature) return f;
  if (s.type == RopeType::yarn) {
    if (s.attention_factor > 0)
      f.cos_sin_multiplier = s.attention_factor;
    else if (s.mscale > 0 && s.mscale_all_dim > 0)
      f.cos_sin_multiplier =
          yarn_get_mscale(factor, s.mscale) / yarn_get_mscale(factor, s.mscale_all_dim);
    else
      f.cos_sin_multiplier = yarn_get_mscale(factor, 1.0);
  }
  if (s.mscale_all_dim > 0) {
    const double m = yarn_get_mscale(factor, s.mscale_all_dim);
    f.softmax_scale *= m * m;
  }
  return f;
}

RopeTable make_rope_table(const RopeFreqs& f, int64_t first_position, int64_t positions) {
  RopeTable t;
  t.positions = positions;
  t.half = static_cast<int64_t>(f.inv_freq.size());
  t.cos.resize(static_cast<size_t>(positions * t.half));
  t.sin.resize(t.cos.size());
  for (int64_t p = 0; p < positions; ++p)
    for (int64_t i = 0; i < t.half; ++i) {
      const double angle =
          static_cast<double>(first_position + p) * f.inv_freq[static_cast<size_t>(i)];
      const auto at = static_cast<size_t>(p * t.half + i);
      t.cos[at] = static_cast<float>(std::cos(angle) * f.cos_sin_multiplier);
      t.sin[at] = static_cast<float>(std::sin(angle) * f.cos_sin_multiplier);
    }
  return t;
}

}  // namespace v3b::model
