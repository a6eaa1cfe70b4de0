// Routers (SPEC 1.11, 1.12): scores, selection bias, group limit, top-k, gate weights.
#pragma once
#include "reference/spec/dtype.h"
#include "reference/spec/flags.h"
#include "reference/spec/glossary.h"

namespace v3b::spec {

enum class Scoring : uint8_t { sigmoid, softmax };
// How groups are ranked: V3 sums the two best biased scores, V2 takes the best score, none = one
// group.
enum class GroupRule : uint8_t { none, top2_sum, max };

struct RouterConfig {
  int64_t E = 256, K = 8, G = 8, M = 4;
  Scoring scoring = Scoring::sigmoid;
  GroupRule group_rule = GroupRule::top2_sum;
  bool norm_topk_prob = true;
  double c_r = 2.5;  // applied after normalisation; V2: only when not normalising
  bool scale_only_if_unnormalised = false;
  RouterMask router_mask = RouterMask::neg_inf;
  GateEps gate_eps = GateEps::eps_1e20;
};

// A case of the op: logits N(0, 1), bias N(0, 0.1).
struct RouterShape {
  int64_t T = 512, E = 256, K = 8, G = 8, M = 4;
  Scoring scoring = Scoring::sigmoid;
  GroupRule group_rule = GroupRule::top2_sum;
  bool norm_topk_prob = true;
  double c_r = 2.5;
  bool bias = true;
  RouterMask router_mask = RouterMask::neg_inf;
  GateEps gate_eps = GateEps::eps_1e20;
  DType dtype = DType::f32;  // of the logits: f32
  template <class S, class V>
  static void visit(S& s, V&& v) {
    v("T", s.T);
    v("E", s.E);
    v("K", s.K);
    v("G", s.G);
    v("M", s.M);
    v("scoring", s.scoring);
    v("group_rule", s.group_rule);
    v("norm_topk_prob", s.norm_topk_prob);
    v("c_r", s.c_r);
    v("bias", s.bias);
    v("router_mask", s.router_mask);
    v("gate_eps", s.gate_eps);
    v("dtype", s.dtype);
  }
};

// Selection from given scores. Ties: larger first, then lower index (SPEC 0.1).
struct RouterSelectArgs {
  RouterConfig config;
  int64_t T;
  const float* logits;  // [T, E] fp32: z = x W_g^T
  const float* bias;    // [E] or null
  int32_t* idx;         // [T, K] in selection order
  float* weight;        // [T, K]
  float* scores;        // [T, E] or null: sigmoid(z) or softmax(z)
};

}  // namespace v3b::spec
