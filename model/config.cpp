// config.json -> ModelConfig: JSON types, both RoPE spellings, defaults of the Hugging Face classes
// (SPEC 2.2).
#include "model/config.h"

#include <sys/stat.h>

#include <cmath>
#include <set>

#include "model/error.h"
#include "model/json_util.h"

namespace v3b::model {

namespace {

using nlohmann::json;

// One JSON object being read: typed getters that remember which keys were asked for.
class Reader {
 public:
  Reader(const json& object, std::string where, std::string prefix = "")
      : o_(object), where_(std::move(where)), prefix_(std::move(prefix)) {}

  [[noreturn]] void fail(const std::string& key, const std::string& what,
                         const std::string& expected, const std::string& found) const {
    throw Error(ExitCode::bad_input, what, where_ + ", key \"" + prefix_ + key + "\"", expected,
                found);
  }
  const json* find(const std::string& key) {
    seen_.insert(key);
    const auto it = o_.find(key);
    return it == o_.end() ? nullptr : &*it;
  }
  bool given(const std::string& key) {
    const json* v = find(key);
    return v && !v->is_null();
  }
  int64_t integer(const std::string& key) {
    const json* v = find(key);
    if (!v) fail(key, "missing", "an integer", "no such key");
    return as_integer(key, *v, "an integer");
  }
  int64_t integer(const std::string& key, int64_t fallback) {
    return given(key) ? as_integer(key, *find(key), "an integer") : fallback;
  }
  int64_t integer_or_null(const std::string& key) {  // must be there; null means 0
    const json* v = find(key);
    if (!v) fail(key, "missing", "an integer or null", "no such key");
    return v->is_null() ? 0 : as_integer(key, *v, "an integer or null");
  }
  double real(const std::string& key, double fallback) {
    if (!given(key)) return fallback;
    const json& v = *find(key);
    if (!v.is_number()) fail(key, "wrong type", "a number", brief(v));
    return v.get<double>();
  }
  bool boolean(const std::string& key, bool fallback) {
    if (!given(key)) return fallback;
    const json& v = *find(key);
    if (!v.is_boolean()) fail(key, "wrong type", "true or false", brief(v));
    return v.get<bool>();
  }
  std::string string(const std::string& key, const std::string& fallback) {
    if (!given(key)) return fallback;
    const json& v = *find(key);
    if (!v.is_string()) fail(key, "wrong type", "a string", brief(v));
    return v.get<std::string>();
  }
  void ignore(std::initializer_list<const char*> keys) {
    for (const char* k : keys) seen_.insert(k);
  }
  void warn_unknown(std::vector<std::string>& warnings) const {
    for (const auto& [key, value] : o_.items())
      if (!seen_.count(key))
        warnings.push_back(where_ + ": unknown key \"" + prefix_ + key + "\" ignored");
  }
  const std::string& where() const { return where_; }

 private:
  int64_t as_integer(const std::string& key, const json& v, const char* expected) const {
    if (v.is_number_unsigned()) {
      if (v.get<uint64_t>() > static_cast<uint64_t>(INT64_MAX))
        fail(key, "out of range", expected, brief(v));
      return v.get<int64_t>();
    }
    if (!v.is_number_integer()) fail(key, "wrong type", expected, brief(v));
    return v.get<int64_t>();
  }
  const json& o_;
  std::string where_, prefix_;
  std::set<std::string> seen_;
};

RopeType parse_rope_type(Reader& r, const std::string& key, const std::string& name,
                         bool* dynamic) {
  *dynamic = name == "dynamic-yarn" || name == "dynamic_yarn";
  if (*dynamic || name == "yarn" || name == "deepseek_yarn") return RopeType::yarn;
  if (name == "default" || name == "none") return RopeType::none;
  if (name == "linear") return RopeType::linear;
  if (name == "ntk") return RopeType::ntk;
  if (name == "dynamic") return RopeType::dynamic;
  if (name == "ntk_by_parts" || name == "ntk-by-parts") return RopeType::ntk_by_parts;
  r.fail(key, "unknown rope type",
         "default, linear, ntk, dynamic, ntk_by_parts, yarn or dynamic-yarn", "\"" + name + "\"");
}

RopeScaling parse_rope_scaling(Reader& r) {
  RopeScaling s;
  const bool has_type = r.given("type"), has_rope_type = r.given("rope_type");
  const std::string type = r.string("type", ""), rope_type = r.string("rope_type", "");
  if (!has_type && !has_rope_type)
    r.fail("rope_type", "missing", "a rope type", "neither type nor rope_type");
  if (has_type && has_rope_type && type != rope_type)
    r.fail("rope_type", "contradiction", "the same as type = \"" + type + "\"",
           "\"" + rope_type + "\"");
  s.type = parse_rope_type(r, has_rope_type ? "rope_type" : "type",
                           has_rope_type ? rope_type : type, &s.dynamic);
  if (s.type != RopeType::none && !r.given("factor"))
    r.fail("factor", "missing", "a number >= 1", "no such key");
  s.factor = r.real("factor", 1.0);
  s.original_max_position_embeddings = r.integer("original_max_position_embeddings", 0);
  if (r.given("original_max_position_embeddings") && s.original_max_position_embeddings <= 0)
    r.fail("original_max_position_embeddings", "invalid value", "an integer > 0",
           std::to_string(s.original_max_position_embeddings));
  s.beta_fast = r.real("beta_fast", 32);
  s.beta_slow = r.real("beta_slow", 1);
  s.mscale = r.real("mscale", 0);
  s.mscale_all_dim = r.real("mscale_all_dim", 0);
  s.attention_factor = r.real("attention_factor", 0);
  if (r.given("attention_factor") && !(s.attention_factor > 0))
    r.fail("attention_factor", "invalid value", "a number > 0", brief(*r.find("attention_factor")));
  s.temperature = r.boolean("temperature", true);
  if (!r.boolean("truncate", true))
    r.fail("truncate", "unsupported", "true (integer ramp corners)", "false");
  return s;
}

// Old spelling: rope_theta beside rope_scaling {type|rope_type, ...} or null. New: rope_parameters
// holds both.
void parse_rope(Reader& r, ModelConfig& c) {
  bool have_scaling = false, have_theta = r.given("rope_theta");
  c.rope_theta = r.real("rope_theta", 10000.0);
  for (const char* key : {"rope_scaling", "rope_parameters"}) {
    const json* v = r.find(key);
    if (!v || v->is_null()) continue;
    if (!v->is_object()) r.fail(key, "wrong type", "an object or null", brief(*v));
    Reader inner(*v, r.where(), std::string(key) + ".");
    const RopeScaling s = parse_rope_scaling(inner);
    if (have_scaling && (s.type != c.rope_scaling.type || s.factor != c.rope_scaling.factor))
      inner.fail("rope_type", "contradiction", "the same as rope_scaling", brief(*v));
    c.rope_scaling = s;
    have_scaling = true;
    if (inner.given("rope_theta")) {
      const double theta = inner.real("rope_theta", 0);
      if (have_theta && theta != c.rope_theta)
        inner.fail("rope_theta", "contradiction",
                   "the same as rope_theta = " + std::to_string(c.rope_theta),
                   std::to_string(theta));
      c.rope_theta = theta;
      have_theta = true;
    }
    inner.ignore({"partial_rotary_factor", "extrapolation_factor", "finetuned"});
    inner.warn_unknown(c.warnings);
  }
}

void parse_quantization(Reader& r, ModelConfig& c) {
  const json* v = r.find("quantization_config");
  if (!v || v->is_null()) return;
  if (!v->is_object()) r.fail("quantization_config", "wrong type", "an object or null", brief(*v));
  Reader q(*v, r.where(), "quantization_config.");
  auto must_be = [&](const char* key, const char* want) {
    const std::string found = q.string(key, want);
    if (found != want)
      q.fail(key, "unsupported", std::string("\"") + want + "\"", "\"" + found + "\"");
  };
  if (!q.given("quant_method")) q.fail("quant_method", "missing", "\"fp8\"", "no such key");
  must_be("quant_method", "fp8");
  must_be("fmt", "e4m3");
  must_be("activation_scheme", "dynamic");
  if (q.given("weight_block_size") && *q.find("weight_block_size") != json::array({128, 128}))
    q.fail("weight_block_size", "unsupported", "[128,128]", brief(*q.find("weight_block_size")));
  if (q.given("scale_fmt")) {
    must_be("scale_fmt", "ue8m0");
    c.ue8m0 = true;
  }
  c.fp8 = true;
  q.ignore({"modules_to_not_convert", "ignored_layers", "dequantize"});
  q.warn_unknown(c.warnings);
}

void parse_router(Reader& r, ModelConfig& c) {
  const bool v2 = c.model_type == "deepseek_v2";
  const std::string scoring = r.string("scoring_func", v2 ? "softmax" : "sigmoid");
  if (scoring == "sigmoid")
    c.scoring_func = ScoringFunc::sigmoid;
  else if (scoring == "softmax")
    c.scoring_func = ScoringFunc::softmax;
  else
    r.fail("scoring_func", "unknown", "sigmoid or softmax", "\"" + scoring + "\"");
  const std::string method = r.string("topk_method", v2 ? "greedy" : "noaux_tc");
  if (method == "noaux_tc")
    c.topk_method = TopkMethod::noaux_tc;
  else if (method == "group_limited_greedy")
    c.topk_method = TopkMethod::group_limited_greedy;
  else if (method == "greedy")
    c.topk_method = TopkMethod::greedy;
  else
    r.fail("topk_method", "unknown", "noaux_tc, group_limited_greedy or greedy",
           "\"" + method + "\"");
  c.n_routed_experts = r.integer("n_routed_experts");
  c.num_experts_per_tok = r.integer("num_experts_per_tok");
  // Plain greedy has no groups: V2-Lite writes 1 and 1, the V2 class default is null.
  const bool greedy = c.topk_method == TopkMethod::greedy;
  c.n_group = greedy ? r.integer("n_group", 1) : r.integer("n_group");
  c.topk_group = greedy ? r.integer("topk_group", 1) : r.integer("topk_group");
  c.norm_topk_prob = r.boolean("norm_topk_prob", !v2);
  c.routed_scaling_factor = r.real("routed_scaling_factor", v2 ? 1.0 : 2.5);
}

}  // namespace

ModelConfig parse_config(const std::string& json_text, const std::string& where) {
  const json j = parse_json(json_text, where);
  if (!j.is_object())
    throw Error(ExitCode::bad_input, "top level", where, "a JSON object", brief(j));
  Reader r(j, where);
  ModelConfig c;
  if (!r.given("model_type"))
    r.fail("model_type", "missing", "deepseek_v3, deepseek_v2 or kimi_k2", "no such key");
  c.model_type = r.string("model_type", "");
  if (c.model_type != "deepseek_v3" && c.model_type != "deepseek_v2" && c.model_type != "kimi_k2")
    r.fail("model_type", "unknown", "deepseek_v3, deepseek_v2 or kimi_k2",
           "\"" + c.model_type + "\"");
  c.vocab_size = r.integer("vocab_size");
  c.hidden_size = r.integer("hidden_size");
  c.intermediate_size = r.integer("intermediate_size");
  c.moe_intermediate_size = r.integer("moe_intermediate_size");
  c.num_hidden_layers = r.integer("num_hidden_layers");
  c.num_nextn_predict_layers = r.integer("num_nextn_predict_layers", 0);
  c.num_attention_heads = r.integer("num_attention_heads");
  c.n_shared_experts = r.integer_or_null("n_shared_experts");
  c.kv_lora_rank = r.integer("kv_lora_rank");
  c.q_lora_rank = r.integer_or_null("q_lora_rank");
  c.qk_nope_head_dim = r.integer("qk_nope_head_dim");
  c.qk_rope_head_dim = r.integer("qk_rope_head_dim");
  c.v_head_dim = r.integer("v_head_dim");
  c.moe_layer_freq = r.integer("moe_layer_freq", 1);
  c.first_k_dense_replace = r.integer("first_k_dense_replace");
  c.max_position_embeddings = r.integer("max_position_embeddings", 4096);
  c.rms_norm_eps = r.real("rms_norm_eps", 1e-6);
  c.initializer_range = r.real("initializer_range", 0.02);
  c.bos_token_id = r.integer("bos_token_id", 0);
  if (r.given("eos_token_id") &&
      r.find("eos_token_id")->is_array()) {  // newer files may list several
    const json& list = *r.find("eos_token_id");
    if (list.empty() || !list[0].is_number_integer())
      r.fail("eos_token_id", "wrong type", "an integer or a list of integers", brief(list));
    c.eos_token_id = list[0].get<int64_t>();
  } else {
    c.eos_token_id = r.integer("eos_token_id", 1);
  }
  c.tie_word_embeddings = r.boolean("tie_word_embeddings", false);
  c.rope_interleave = r.boolean("rope_interleave", true);
  c.torch_dtype = r.string("torch_dtype", r.string("dtype", "bfloat16"));
  parse_router(r, c);
  parse_rope(r, c);
  parse_quantization(r, c);
  if (const std::string act = r.string("hidden_act", "silu"); act != "silu")
    r.fail("hidden_act", "unsupported", "\"silu\"", "\"" + act + "\"");
  if (r.boolean("attention_bias", false)) r.fail("attention_bias", "unsupported", "false", "true");
  if (r.given("num_key_value_heads") && r.integer("num_key_value_heads") < 1)
    r.fail("num_key_value_heads", "invalid value", "an integer >= 1",
           std::to_string(r.integer("num_key_value_heads")));
  r.ignore({"architectures",
            "auto_map",
            "transformers_version",
            "use_cache",
            "pad_token_id",
            "pretraining_tp",
            "attention_dropout",
            "aux_loss_alpha",
            "seq_aux",
            "ep_size",
            "num_key_value_heads",
            "head_dim",
            "qk_head_dim",
            "_name_or_path",
            "output_router_logits",
            "router_aux_loss_coef",
            "dtype",
            "torch_dtype",
            "use_return_dict",
            "is_encoder_decoder",
            "output_attentions",
            "output_hidden_states",
            "return_dict",
            "chunk_size_feed_forward",
            "id2label",
            "label2id",
            "problem_type",
            "mlp_bias"});
  r.warn_unknown(c.warnings);
  validate_config(c, where);
  if (c.rope_scaling.type == RopeType::yarn && c.rope_scaling.beta_fast == c.rope_scaling.beta_slow)
    c.warnings.push_back(where +
                         ": beta_fast equals beta_slow (YaRN's index ramp spans at most one pair)");
  return c;
}

ModelConfig load_config(const std::string& path) {
  struct stat st {};
  const bool is_dir = ::stat(path.c_str(), &st) == 0 && S_ISDIR(st.st_mode);
  const std::string file = is_dir ? path + "/config.json" : path;
  return parse_config(read_text_file(file, 16 << 20), file);
}

}  // namespace v3b::model
