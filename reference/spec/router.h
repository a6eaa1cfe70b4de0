// Routers (SPEC 1.11, 1.12): scores, selection bias, group limit, top-k, gate weights.
#pragma once
#include "reference/spec/dtype.h"
#include "reference/spec/flags.h"
#include "reference/spec/glossary.h"

namespace v3b::spec {

enum class Scoring : uint8_t { sigmoid, softmax };
// How groups are ranked: V3 sums the two best biased scores, V2 takes the best score, none = one group.
enum class GroupRule : uint8_t { none, top2_sum, max };

struct RouterConfig {
  int64_t E = 256, K = 8, G = 8, M = 4;
  Scoring scoring = Scoring::sigmoid;
  GroupRule group_rule = GroupRule::top2_sum;
  bool norm_topk_prob = true;
  double c_r = 2.5;                     // applied after normalisation; V2: only when not normalising
  bool scale_only_if_unnormalised = false;
  RouterMask router_mask = RouterMask::neg_inf;
  GateEps gate_eps = GateEps::eps_1e20;
};

// Selection from given scores. Ties: larger first, then lower index (SPEC 0.1).
struct RouterSelectArgs {
  RouterConfig config;
  int64_t T;
  const float* logits;   // [T, E] fp32: z = x W_g^T
  const float* bias;     // [E] or null
  int32_t* idx;          // [T, K] in selection order
  float* weight;         // [T, K]
  float* scores;         // [T, E] or null: sigmoid(z) or softmax(z)
};

}  // namespace v3b::spec
