// config.json of the V3 family -> ModelConfig, validated by SPEC 2.3 (rules 1-5, 7 partly).
// Fields bear the checkpoint's own key names. Plain struct: kernels may include this header.
#pragma once
#include <cstdint>
#include <string>
#include <vector>

namespace v3b::model {

enum class RopeType { none, linear, ntk, dynamic, ntk_by_parts, yarn };  // "default" = none
enum class ScoringFunc { sigmoid, softmax };
enum class TopkMethod { noaux_tc, group_limited_greedy, greedy };

struct RopeScaling {
  RopeType type = RopeType::none;
  double factor = 1.0;
  int64_t original_max_position_embeddings = 0;  // 0: not given (then max_position_embeddings)
  double beta_fast = 32, beta_slow = 1;
  double mscale = 0, mscale_all_dim = 0;  // 0: not given
  double attention_factor = 0;            // 0: not given (explicit multiplier of cos and sin)
  bool temperature = true;                // experiment knob: false switches YaRN's temperature off
  bool dynamic = false;  // YaRN only ("dynamic-yarn"): factor = max(1, l/L) at every call
};

struct ModelConfig {
  std::string model_type = "deepseek_v3";
  int64_t vocab_size = 0, hidden_size = 0, intermediate_size = 0, moe_intermediate_size = 0;
  int64_t num_hidden_layers = 0, num_nextn_predict_layers = 0;
  int64_t num_attention_heads = 0;
  int64_t n_shared_experts = 0, n_routed_experts = 0, num_experts_per_tok = 0;
  int64_t n_group = 1, topk_group = 1;
  double routed_scaling_factor = 1.0;
  int64_t kv_lora_rank = 0, q_lora_rank = 0;  // q_lora_rank null -> 0
  int64_t qk_nope_head_dim = 0, qk_rope_head_dim = 0, v_head_dim = 0;
  int64_t moe_layer_freq = 1, first_k_dense_replace = 0;
  bool norm_topk_prob = true;
  ScoringFunc scoring_func = ScoringFunc::sigmoid;
  TopkMethod topk_method = TopkMethod::noaux_tc;
  int64_t max_position_embeddings = 4096;
  double rms_norm_eps = 1e-6, initializer_range = 0.02;
  int64_t bos_token_id = 0, eos_token_id = 1;
  bool tie_word_embeddings = false;
  double rope_theta = 10000.0;
  RopeScaling rope_scaling;
  bool rope_interleave = true;
  bool fp8 = false;    // quantization_config present (e4m3, 128x128, dynamic)
  bool ue8m0 = false;  // scale_fmt "ue8m0"
  std::string torch_dtype = "bfloat16";
  std::vector<std::string> warnings;  // unknown keys; main prints them

  int64_t qk_head_dim() const { return qk_nope_head_dim + qk_rope_head_dim; }
  // MoE iff l >= first_k_dense_replace and l % moe_layer_freq == 0 (SPEC 1.32); MTP layers always.
  bool is_moe_layer(int64_t l) const {
    return n_routed_experts > 0 &&
           (l >= num_hidden_layers || (l >= first_k_dense_replace && l % moe_layer_freq == 0));
  }
};

// Both throw v3b::Error (bad_input or not_found) with `where` = path and key.
ModelConfig load_config(const std::string& path);  // file or checkpoint directory
ModelConfig parse_config(const std::string& json_text,
                         const std::string& where);  // parse + validate
void validate_config(const ModelConfig& c, const std::string& where);
// SPEC 2.3 rule 2, last clause: throws bad_input unless 1 <= context <= max_position_embeddings.
void check_context(const ModelConfig& c, int64_t context, const std::string& where);
std::string config_to_json(
    const ModelConfig& c);  // Hugging Face spelling, readable by transformers
// model/presets/<name>.json: v3, r1, v2-lite, moonlight, kimi-k2, micro, train, tiny ...; lists names on error.
ModelConfig load_preset(const std::string& name);
std::vector<std::string> preset_names();  // sorted
const char* rope_type_name(RopeType t);   // "default", "linear", "ntk", ...
const char* scoring_func_name(ScoringFunc f);
const char* topk_method_name(TopkMethod m);
// Folder that holds presets/, tiny-v3/: $V3BENCH_MODEL_DIR, else beside the binary, else the source tree.
std::string model_dir();

}  // namespace v3b::model
