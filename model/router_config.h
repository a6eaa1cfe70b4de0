// RouterConfig of a model configuration under a flag set (SPEC 1.11, 1.12); shared by reference and
// kernels.
#pragma once
#include "model/config.h"
#include "reference/spec/flags.h"
#include "reference/spec/router.h"

namespace v3b::model {

inline spec::RouterConfig router_config(const ModelConfig& c, const spec::Flags& flags) {
  spec::RouterConfig r;
  r.E = c.n_routed_experts;
  r.K = c.num_experts_per_tok;
  const bool grouped =
      c.topk_method != TopkMethod::greedy && c.n_group > 1 && !flags.ignore_group_limit;
  r.G = grouped ? c.n_group : 1;
  r.M = grouped ? c.topk_group : 1;
  r.scoring =
      c.scoring_func == ScoringFunc::sigmoid ? spec::Scoring::sigmoid : spec::Scoring::softmax;
  r.group_rule = !grouped                                ? spec::GroupRule::none
                 : c.topk_method == TopkMethod::noaux_tc ? spec::GroupRule::top2_sum
                                                         : spec::GroupRule::max;
  r.norm_topk_prob = c.norm_topk_prob;
  r.c_r = c.routed_scaling_factor;
  r.scale_only_if_unnormalised = c.topk_method != TopkMethod::noaux_tc;
  r.router_mask = flags.router_mask;
  r.gate_eps = flags.gate_eps;
  return r;
}
// Whether the selection bias takes part.
inline bool router_uses_bias(const ModelConfig& c, const spec::Flags& flags) {
  return c.topk_method == TopkMethod::noaux_tc && !flags.ignore_selection_bias;
}

}  // namespace v3b::model
