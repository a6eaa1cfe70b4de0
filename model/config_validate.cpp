// SPEC 2.3, rules 1-4 on the parsed struct (5 and everything about JSON types: config.cpp; 6 and 7:
// weights).
#include <cmath>

#include "model/config.h"
#include "model/error.h"

namespace v3b::model {

namespace {

struct Checker {
  const std::string& where;

  [[noreturn]] void fail(const std::string& key, const std::string& expected,
                         const std::string& found) const {
    throw Error(ExitCode::bad_input, "invalid value", where + ", key \"" + key + "\"", expected,
                found);
  }
  void range(const char* key, int64_t v, int64_t lo, int64_t hi,
             const std::string& why = "") const {
    if (v < lo || v > hi)
      fail(key, "an integer from " + std::to_string(lo) + " to " + std::to_string(hi) + why,
           std::to_string(v));
  }
  void real(const char* key, double v, bool ok, const std::string& expected) const {
    if (!ok || !std::isfinite(v)) fail(key, expected, number(v));
  }
  static std::string number(double v) {
    char buf[40];
    std::snprintf(buf, sizeof buf, "%.10g", v);
    return buf;
  }
};

// Upper limits: far above any published model, low enough that products of two fit 63 bits with
// room.
constexpr int64_t kMaxDim = 1 << 20, kMaxVocab = 1 << 24, kMaxHeads = 1 << 14, kMaxLayers = 1 << 12,
                  kMaxExperts = 1 << 16, kMaxContext = int64_t{1} << 31;

void check_rope(const ModelConfig& c, const Checker& k) {
  const RopeScaling& r = c.rope_scaling;
  k.real("rope_theta", c.rope_theta, c.rope_theta > 1, "a number > 1");
  if (r.original_max_position_embeddings <
      0)  // 0 stands for "not given"; the parser rejects a written 0
    k.fail("rope_scaling.original_max_position_embeddings", "an integer > 0",
           std::to_string(r.original_max_position_embeddings));
  k.range("rope_scaling.original_max_position_embeddings", r.original_max_position_embeddings, 0,
          kMaxContext);
  if (r.type == RopeType::none) return;
  k.real("rope_scaling.factor", r.factor, r.factor >= 1, "a number >= 1");
  k.real("rope_scaling.mscale", r.mscale, r.mscale >= 0, "a number >= 0");
  k.real("rope_scaling.mscale_all_dim", r.mscale_all_dim, r.mscale_all_dim >= 0, "a number >= 0");
  k.real("rope_scaling.attention_factor", r.attention_factor, r.attention_factor >= 0,
         "a number > 0");
  if (r.type == RopeType::yarn || r.type == RopeType::ntk_by_parts) {
    k.real("rope_scaling.beta_slow", r.beta_slow, r.beta_slow > 0, "a number > 0");
    // Equal betas are published (Kimi-K2: 1 and 1) and well defined for YaRN's index ramp, whose
    // corners are rounded outwards; the ramp of NTK-by-parts divides by their difference.
    const bool equal_ok = r.type == RopeType::yarn && r.beta_fast == r.beta_slow;
    k.real("rope_scaling.beta_fast", r.beta_fast, r.beta_fast > r.beta_slow || equal_ok,
           "a number > beta_slow = " + Checker::number(r.beta_slow));
  }
  if ((r.type == RopeType::ntk || r.type == RopeType::dynamic) && c.qk_rope_head_dim < 4)
    k.fail("qk_rope_head_dim", "at least 4 with NTK scaling (exponent d_r/(d_r-2))",
           std::to_string(c.qk_rope_head_dim));
}

void check_router(const ModelConfig& c, const Checker& k) {
  const int64_t E = c.n_routed_experts, G = c.n_group;
  k.range("n_group", G, 1, kMaxExperts);
  if (E % G != 0)
    k.fail("n_routed_experts", "a multiple of n_group = " + std::to_string(G), std::to_string(E));
  k.range("topk_group", c.topk_group, 1, G, " (n_group)");
  k.range("num_experts_per_tok", c.num_experts_per_tok, 1, c.topk_group * (E / G),
          " (topk_group * n_routed_experts / n_group)");
  const bool needs_pairs =
      c.scoring_func == ScoringFunc::sigmoid || c.topk_method == TopkMethod::noaux_tc;
  if (needs_pairs && G > 1 && E / G < 2)
    k.fail("n_group", "at least 2 experts a group (a group's score is the sum of its best two)",
           std::to_string(E / G) + " a group");
  k.real("routed_scaling_factor", c.routed_scaling_factor, c.routed_scaling_factor > 0,
         "a number > 0");
}

}  // namespace

void validate_config(const ModelConfig& c, const std::string& where) {
  const Checker k{where};
  k.range("vocab_size", c.vocab_size, 1, kMaxVocab);
  k.range("hidden_size", c.hidden_size, 1, kMaxDim);
  k.range("intermediate_size", c.intermediate_size, 1, kMaxDim);
  k.range("moe_intermediate_size", c.moe_intermediate_size, 1, kMaxDim);
  k.range("num_hidden_layers", c.num_hidden_layers, 1, kMaxLayers);
  k.range("num_attention_heads", c.num_attention_heads, 1, kMaxHeads);
  k.range("n_routed_experts", c.n_routed_experts, 1, kMaxExperts);
  k.range("n_shared_experts", c.n_shared_experts, 0, 1 << 10);
  k.range("kv_lora_rank", c.kv_lora_rank, 1, kMaxDim);
  k.range("q_lora_rank", c.q_lora_rank, 0, kMaxDim);
  k.range("qk_nope_head_dim", c.qk_nope_head_dim, 1, kMaxDim);
  k.range("v_head_dim", c.v_head_dim, 1, kMaxDim);
  k.range("qk_rope_head_dim", c.qk_rope_head_dim, 1, kMaxDim);
  if (c.qk_rope_head_dim % 2 != 0)
    k.fail("qk_rope_head_dim", "an even number", std::to_string(c.qk_rope_head_dim));
  k.range("first_k_dense_replace", c.first_k_dense_replace, 0, c.num_hidden_layers,
          " (num_hidden_layers)");
  k.range("moe_layer_freq", c.moe_layer_freq, 1, kMaxLayers);
  k.range("num_nextn_predict_layers", c.num_nextn_predict_layers, 0, 64);
  k.range("max_position_embeddings", c.max_position_embeddings, 1, kMaxContext);
  k.real("rms_norm_eps", c.rms_norm_eps, c.rms_norm_eps > 0 && c.rms_norm_eps < 1,
         "a number between 0 and 1");
  k.real("initializer_range", c.initializer_range, c.initializer_range >= 0, "a number >= 0");
  check_router(c, k);
  check_rope(c, k);
}

void check_context(const ModelConfig& c, int64_t context, const std::string& where) {
  if (context < 1 || context > c.max_position_embeddings)
    throw Error(ExitCode::bad_input, "requested context", where,
                "1 to max_position_embeddings = " + std::to_string(c.max_position_embeddings),
                std::to_string(context));
}

}  // namespace v3b::model
