// ModelConfig -> config.json in the Hugging Face spelling, and the names of its enumerations.
#include "model/config.h"
#include "model/json_util.h"

namespace v3b::model {

const char* rope_type_name(RopeType t) {
  switch (t) {
    case RopeType::none:
      return "default";
    case RopeType::linear:
      return "linear";
    case RopeType::ntk:
      return "ntk";
    case RopeType::dynamic:
      return "dynamic";
    case RopeType::ntk_by_parts:
      return "ntk_by_parts";
    case RopeType::yarn:
      return "yarn";
  }
  return "?";
}
const char* scoring_func_name(ScoringFunc f) {
  return f == ScoringFunc::sigmoid ? "sigmoid" : "softmax";
}
const char* topk_method_name(TopkMethod m) {
  switch (m) {
    case TopkMethod::noaux_tc:
      return "noaux_tc";
    case TopkMethod::group_limited_greedy:
      return "group_limited_greedy";
    case TopkMethod::greedy:
      return "greedy";
  }
  return "?";
}

std::string config_to_json(const ModelConfig& c) {
  nlohmann::ordered_json j;
  const bool v2 = c.model_type == "deepseek_v2";
  j["architectures"] = {v2 ? "DeepseekV2ForCausalLM" : "DeepseekV3ForCausalLM"};
  j["model_type"] = c.model_type;
  j["vocab_size"] = c.vocab_size;
  j["hidden_size"] = c.hidden_size;
  j["intermediate_size"] = c.intermediate_size;
  j["moe_intermediate_size"] = c.moe_intermediate_size;
  j["num_hidden_layers"] = c.num_hidden_layers;
  j["num_nextn_predict_layers"] = c.num_nextn_predict_layers;
  j["num_attention_heads"] = c.num_attention_heads;
  j["num_key_value_heads"] = c.num_attention_heads;
  j["n_shared_experts"] = c.n_shared_experts;
  j["n_routed_experts"] = c.n_routed_experts;
  j["num_experts_per_tok"] = c.num_experts_per_tok;
  j["n_group"] = c.n_group;
  j["topk_group"] = c.topk_group;
  j["norm_topk_prob"] = c.norm_topk_prob;
  j["routed_scaling_factor"] = c.routed_scaling_factor;
  j["scoring_func"] = scoring_func_name(c.scoring_func);
  j["topk_method"] = topk_method_name(c.topk_method);
  j["moe_layer_freq"] = c.moe_layer_freq;
  j["first_k_dense_replace"] = c.first_k_dense_replace;
  j["kv_lora_rank"] = c.kv_lora_rank;
  j["q_lora_rank"] =
      c.q_lora_rank > 0 ? nlohmann::ordered_json(c.q_lora_rank) : nlohmann::ordered_json(nullptr);
  j["qk_nope_head_dim"] = c.qk_nope_head_dim;
  j["qk_rope_head_dim"] = c.qk_rope_head_dim;
  j["v_head_dim"] = c.v_head_dim;
  j["hidden_act"] = "silu";
  j["attention_bias"] = false;
  j["attention_dropout"] = 0.0;
  j["max_position_embeddings"] = c.max_position_embeddings;
  j["rms_norm_eps"] = c.rms_norm_eps;
  j["initializer_range"] = c.initializer_range;
  j["bos_token_id"] = c.bos_token_id;
  j["eos_token_id"] = c.eos_token_id;
  j["tie_word_embeddings"] = c.tie_word_embeddings;
  j["rope_interleave"] = c.rope_interleave;
  j["rope_theta"] = c.rope_theta;
  const RopeScaling& s = c.rope_scaling;
  if (s.type == RopeType::none) {
    j["rope_scaling"] = nullptr;
  } else {
    nlohmann::ordered_json r;
    r["type"] = r["rope_type"] =
        s.dynamic && s.type == RopeType::yarn ? "dynamic-yarn" : rope_type_name(s.type);
    r["factor"] = s.factor;
    if (s.original_max_position_embeddings)
      r["original_max_position_embeddings"] = s.original_max_position_embeddings;
    r["beta_fast"] = s.beta_fast;
    r["beta_slow"] = s.beta_slow;
    if (s.mscale != 0) r["mscale"] = s.mscale;
    if (s.mscale_all_dim != 0) r["mscale_all_dim"] = s.mscale_all_dim;
    if (s.attention_factor != 0) r["attention_factor"] = s.attention_factor;
    if (!s.temperature) r["temperature"] = false;
    j["rope_scaling"] = r;
  }
  if (c.fp8) {
    nlohmann::ordered_json q;
    q["quant_method"] = "fp8";
    q["fmt"] = "e4m3";
    q["activation_scheme"] = "dynamic";
    q["weight_block_size"] = {128, 128};
    if (c.ue8m0) q["scale_fmt"] = "ue8m0";
    j["quantization_config"] = q;
  }
  j["torch_dtype"] = c.torch_dtype;
  j["use_cache"] = true;
  return j.dump(2) + "\n";
}

}  // namespace v3b::model
