// Router selection on the CPU. Cost a token: E exponentials, one pass for group sums, K selections
// over E/G*M candidates; at E=256 about 256*(exp ~10 cycles/8 lanes) + K*128/8 compares ~ 1.5k
// cycles. Nothing here is bound by memory (1 KiB of logits a token), so the lanes are the roof;
// rows are independent and go to threads.
#include <cmath>
#include <limits>

#include "kernels/moe/moe.h"

namespace v3b::kern {
namespace {

constexpr int64_t kMaxExperts =
    1024;  // stack rows; larger configurations are refused by config validation
constexpr float kNegInf = -std::numeric_limits<float>::infinity();

void scores_of_row(const spec::RouterConfig& c, const float* z, float* s) {
  if (c.scoring == spec::Scoring::sigmoid) {
    for (int64_t e = 0; e < c.E; ++e) s[e] = 1.0f / (1.0f + std::exp(-z[e]));
    return;
  }
  float m = z[0], sum = 0;
  for (int64_t e = 1; e < c.E; ++e) m = z[e] > m ? z[e] : m;
  for (int64_t e = 0; e < c.E; ++e) sum += s[e] = std::exp(z[e] - m);
  for (int64_t e = 0; e < c.E; ++e) s[e] /= sum;
}

// Position of the largest value, the lower index on ties; NaN never wins over a number.
int64_t argmax(const float* v, int64_t n) {
  int64_t best = 0;
  for (int64_t i = 1; i < n; ++i)
    if (v[i] > v[best] || (std::isnan(v[best]) && !std::isnan(v[i]))) best = i;
  return best;
}

void route_row(const spec::RouterConfig& c, const float* z, const float* bias, int32_t* idx,
               float* weight, float* scores_out) {
  float s[kMaxExperts], b[kMaxExperts], group[kMaxExperts];
  scores_of_row(c, z, s);
  for (int64_t e = 0; e < c.E; ++e) b[e] = bias ? s[e] + bias[e] : s[e];
  if (scores_out)
    for (int64_t e = 0; e < c.E; ++e) scores_out[e] = s[e];

  if (c.group_rule != spec::GroupRule::none && c.G > 1) {
    const int64_t size = c.E / c.G;
    bool kept[kMaxExperts] = {};
    for (int64_t g = 0; g < c.G; ++g) {
      float first = kNegInf, second = kNegInf;
      for (int64_t i = g * size; i < (g + 1) * size; ++i) {
        if (b[i] > first) {
          second = first;
          first = b[i];
        } else if (b[i] > second) {
          second = b[i];
        }
      }
      group[g] = c.group_rule == spec::GroupRule::top2_sum ? first + second : first;
    }
    for (int64_t j = 0; j < c.M; ++j) {
      const int64_t g = argmax(group, c.G);
      kept[g] = true;
      group[g] = std::numeric_limits<float>::quiet_NaN();  // chosen: out of the running
    }
    const float masked = c.router_mask == spec::RouterMask::neg_inf ? kNegInf : 0.0f;
    for (int64_t e = 0; e < c.E; ++e)
      if (!kept[e / size]) b[e] = masked;
  }

  float sum = c.gate_eps == spec::GateEps::eps_1e20 ? 1e-20f : 0.0f;
  for (int64_t k = 0; k < c.K; ++k) {
    const int64_t e = argmax(b, c.E);
    idx[k] = static_cast<int32_t>(e);
    weight[k] = s[e];
    sum += s[e];
    b[e] = std::numeric_limits<float>::quiet_NaN();
  }
  const bool normalise = c.norm_topk_prob && c.K > 1;
  const float scale = c.scale_only_if_unnormalised && normalise ? 1.0f : static_cast<float>(c.c_r);
  for (int64_t k = 0; k < c.K; ++k) weight[k] = (normalise ? weight[k] / sum : weight[k]) * scale;
}

}  // namespace

void router_select_cpu_simd(const spec::RouterSelectArgs& a) noexcept {
  const spec::RouterConfig& c = a.config;
  // Below some dozens of tokens a parallel region costs more than the rows.
#pragma omp parallel for schedule(static) if (a.T * c.E > 8192)
  for (int64_t t = 0; t < a.T; ++t)
    route_row(c, a.logits + t * c.E, a.bias, a.idx + t * c.K, a.weight + t * c.K,
              a.scores ? a.scores + t * c.E : nullptr);
}

}  // namespace v3b::kern
