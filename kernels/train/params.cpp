#include "kernels/train/params.h"

#include "model/error.h"

namespace v3b::kern::train {
namespace {

struct Builder {
  ParamTable t;
  int64_t add(const std::string& name, std::vector<int64_t> shape,
              bool fused_with_previous = false) {
    if (!fused_with_previous) t.total = (t.total + 31) / 32 * 32;
    Param p{name, std::move(shape), t.total, false};
    p.matrix = p.shape.size() == 2;
    t.total += p.numel();
    t.trainable += p.numel();
    t.params.push_back(std::move(p));
    return t.params.back().offset;
  }
  FfnRef ffn(const std::string& prefix, int64_t width, int64_t d) {
    FfnRef f;
    f.width = width;
    if (width == 0) return f;
    f.gate_up = add(prefix + "gate_proj.weight", {width, d});
    add(prefix + "up_proj.weight", {width, d}, true);
    f.down = add(prefix + "down_proj.weight", {d, width});
    return f;
  }
  LayerRef layer(const model::ModelConfig& c, int64_t l) {
    const int64_t d = c.hidden_size, nh = c.num_attention_heads;
    LayerRef r;
    r.prefix = "model.layers." + std::to_string(l) + ".";
    const std::string attn = r.prefix + "self_attn.", mlp = r.prefix + "mlp.";
    r.in_norm = add(r.prefix + "input_layernorm.weight", {d});
    if (c.q_lora_rank > 0) {
      r.a_proj = add(attn + "q_a_proj.weight", {c.q_lora_rank, d});
    } else {
      r.a_proj = add(attn + "q_proj.weight", {nh * c.qk_head_dim(), d});
    }
    add(attn + "kv_a_proj_with_mqa.weight", {c.kv_lora_rank + c.qk_rope_head_dim, d}, true);
    if (c.q_lora_rank > 0) {
      r.q_norm = add(attn + "q_a_layernorm.weight", {c.q_lora_rank});
      r.q_b = add(attn + "q_b_proj.weight", {nh * c.qk_head_dim(), c.q_lora_rank});
    }
    r.kv_norm = add(attn + "kv_a_layernorm.weight", {c.kv_lora_rank});
    r.kv_b =
        add(attn + "kv_b_proj.weight", {nh * (c.qk_nope_head_dim + c.v_head_dim), c.kv_lora_rank});
    r.o = add(attn + "o_proj.weight", {d, nh * c.v_head_dim});
    r.post_norm = add(r.prefix + "post_attention_layernorm.weight", {d});
    r.moe = c.is_moe_layer(l);
    if (!r.moe) {
      r.ffn = ffn(mlp, c.intermediate_size, d);
      return r;
    }
    r.moe_index = t.moe_layers++;
    r.router = add(mlp + "gate.weight", {c.n_routed_experts, d});
    r.ffn = ffn(mlp + "shared_experts.", c.n_shared_experts * c.moe_intermediate_size, d);
    for (int64_t e = 0; e < c.n_routed_experts; ++e) {
      const FfnRef x = ffn(mlp + "experts." + std::to_string(e) + ".", c.moe_intermediate_size, d);
      if (e == 0) r.experts = x.gate_up;
      if (e == 1) r.expert_stride = x.gate_up - r.experts;
    }
    return r;
  }
};

}  // namespace

const Param* ParamTable::find(const std::string& name) const {
  for (const Param& p : params) {
    if (p.name == name) return &p;
  }
  return nullptr;
}

ParamTable make_param_table(const model::ModelConfig& c) {
  const auto reject = [](const char* key, const char* expected, const std::string& found) {
    throw Error(ExitCode::bad_input, key, "training configuration", expected, found);
  };
  if (c.num_nextn_predict_layers > 1) {
    reject("num_nextn_predict_layers", "0 or 1", std::to_string(c.num_nextn_predict_layers));
  }
  if (c.n_routed_experts > 0 && c.scoring_func != model::ScoringFunc::sigmoid) {
    reject("scoring_func", "sigmoid", "softmax");
  }
  if (c.tie_word_embeddings) reject("tie_word_embeddings", "false", "true");
  Builder b;
  const int64_t d = c.hidden_size;
  b.t.embed = b.add("model.embed_tokens.weight", {c.vocab_size, d});
  for (int64_t l = 0; l < c.num_hidden_layers; ++l) b.t.layers.push_back(b.layer(c, l));
  b.t.norm = b.add("model.norm.weight", {d});
  b.t.lm_head = b.add("lm_head.weight", {c.vocab_size, d});
  if (c.num_nextn_predict_layers == 1) {
    b.t.mtp = true;
    const std::string p = "model.layers." + std::to_string(c.num_hidden_layers) + ".";
    b.t.enorm = b.add(p + "enorm.weight", {d});
    b.t.hnorm = b.add(p + "hnorm.weight", {d});
    b.t.eh_proj = b.add(p + "eh_proj.weight", {d, 2 * d});
    b.t.layers.push_back(b.layer(c, c.num_hidden_layers));
    b.t.head_norm = b.add(p + "shared_head.norm.weight", {d});
  }
  b.t.total = (b.t.total + 63) / 64 * 64;
  return b.t;
}

double train_flops_per_token(const model::ModelConfig& c, int64_t context) {
  const double d = static_cast<double>(c.hidden_size),
               nh = static_cast<double>(c.num_attention_heads);
  const double dqk = static_cast<double>(c.qk_head_dim()), dv = static_cast<double>(c.v_head_dim);
  const double dc = static_cast<double>(c.kv_lora_rank), dq = static_cast<double>(c.q_lora_rank);
  const double dr = static_cast<double>(c.qk_rope_head_dim);
  const double dn = static_cast<double>(c.qk_nope_head_dim);
  const double q = dq > 0 ? d * dq + dq * nh * dqk : d * nh * dqk;
  const double attn = q + d * (dc + dr) + dc * nh * (dn + dv) + nh * dv * d;
  const double moe = static_cast<double>(c.n_routed_experts) * d +
                     3 * d * static_cast<double>(c.moe_intermediate_size) *
                         static_cast<double>(c.num_experts_per_tok + c.n_shared_experts);
  const double dense = 3 * d * static_cast<double>(c.intermediate_size);
  const double head = d * static_cast<double>(c.vocab_size);
  double macs = head, layers = 0;
  for (int64_t l = 0; l < c.num_hidden_layers + c.num_nextn_predict_layers; ++l) {
    macs += attn + (c.is_moe_layer(l) ? moe : dense);
    layers += 1;
  }
  macs += static_cast<double>(c.num_nextn_predict_layers) * (2 * d * d + head);
  const double keys = static_cast<double>(context) / 2;
  const double core = layers * nh * keys * ((dqk + dv) + (3 * dqk + 2 * dv));  // 2 + 5 products
  return 2 * (3 * macs + core);
}

}  // namespace v3b::kern::train
