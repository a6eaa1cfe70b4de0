// Private to model/: the one list of tensors of SPEC 2.1. walk_weights() sizes the vectors of
// ModelWeights and visits every slot with its Hugging Face name, shape and role; binding, saving,
// random filling and counting are visitors.
#pragma once
#include <string>
#include <vector>

#include "model/weights.h"

namespace v3b::model {

enum class Role {
  embed,
  head,
  norm,
  gate,
  bias,
  quantisable,  // "Q" in SPEC 2.1: may be FP8 with block scales
  eh_proj,
  mtp_embed,
  mtp_head  // the MTP layer's own copies, optional
};

using Shape = std::vector<int64_t>;

template <class F>
void walk_ffn(FfnWeights& w, const std::string& prefix, int64_t d, int64_t width, F& f) {
  f(w.gate_proj, prefix + "gate_proj.weight", Shape{width, d}, Role::quantisable);
  f(w.up_proj, prefix + "up_proj.weight", Shape{width, d}, Role::quantisable);
  f(w.down_proj, prefix + "down_proj.weight", Shape{d, width}, Role::quantisable);
}

template <class F>
void walk_layer(LayerWeights& w, const ModelConfig& c, int64_t layer, F& f) {
  const std::string p = "model.layers." + std::to_string(layer) + ".", a = p + "self_attn.",
                    m = p + "mlp.";
  const int64_t d = c.hidden_size, nh = c.num_attention_heads, dqk = c.qk_head_dim(),
                dc = c.kv_lora_rank;
  f(w.input_layernorm, p + "input_layernorm.weight", Shape{d}, Role::norm);
  if (c.q_lora_rank > 0) {
    f(w.attn.q_a_proj, a + "q_a_proj.weight", Shape{c.q_lora_rank, d}, Role::quantisable);
    f(w.attn.q_a_layernorm, a + "q_a_layernorm.weight", Shape{c.q_lora_rank}, Role::norm);
    f(w.attn.q_b_proj, a + "q_b_proj.weight", Shape{nh * dqk, c.q_lora_rank}, Role::quantisable);
  } else {
    f(w.attn.q_proj, a + "q_proj.weight", Shape{nh * dqk, d}, Role::quantisable);
  }
  f(w.attn.kv_a_proj_with_mqa, a + "kv_a_proj_with_mqa.weight", Shape{dc + c.qk_rope_head_dim, d},
    Role::quantisable);
  f(w.attn.kv_a_layernorm, a + "kv_a_layernorm.weight", Shape{dc}, Role::norm);
  f(w.attn.kv_b_proj, a + "kv_b_proj.weight", Shape{nh * (c.qk_nope_head_dim + c.v_head_dim), dc},
    Role::quantisable);
  f(w.attn.o_proj, a + "o_proj.weight", Shape{d, nh * c.v_head_dim}, Role::quantisable);
  f(w.post_attention_layernorm, p + "post_attention_layernorm.weight", Shape{d}, Role::norm);
  w.is_moe = c.is_moe_layer(layer);
  if (!w.is_moe) {
    walk_ffn(w.mlp, m, d, c.intermediate_size, f);
    return;
  }
  f(w.moe.gate, m + "gate.weight", Shape{c.n_routed_experts, d}, Role::gate);
  if (c.topk_method == TopkMethod::noaux_tc)
    f(w.moe.e_score_correction_bias, m + "gate.e_score_correction_bias", Shape{c.n_routed_experts},
      Role::bias);
  w.moe.experts.resize(static_cast<size_t>(c.n_routed_experts));
  for (int64_t e = 0; e < c.n_routed_experts; ++e)
    walk_ffn(w.moe.experts[static_cast<size_t>(e)], m + "experts." + std::to_string(e) + ".", d,
             c.moe_intermediate_size, f);
  if (c.n_shared_experts > 0)
    walk_ffn(w.moe.shared, m + "shared_experts.", d, c.n_shared_experts * c.moe_intermediate_size,
             f);
}

template <class F>
void walk_weights(ModelWeights& w, const ModelConfig& c, bool mtp, F&& f) {
  const int64_t d = c.hidden_size, V = c.vocab_size, L = c.num_hidden_layers;
  f(w.embed_tokens, "model.embed_tokens.weight", Shape{V, d}, Role::embed);
  w.layers.resize(static_cast<size_t>(L));
  for (int64_t l = 0; l < L; ++l) walk_layer(w.layers[static_cast<size_t>(l)], c, l, f);
  f(w.norm, "model.norm.weight", Shape{d}, Role::norm);
  f(w.lm_head, "lm_head.weight", Shape{V, d}, Role::head);
  w.mtp.resize(static_cast<size_t>(mtp ? c.num_nextn_predict_layers : 0));
  for (size_t k = 0; k < w.mtp.size(); ++k) {
    MtpWeights& t = w.mtp[k];
    const int64_t l = L + static_cast<int64_t>(k);
    const std::string p = "model.layers." + std::to_string(l) + ".";
    f(t.embed_tokens, p + "embed_tokens.weight", Shape{V, d}, Role::mtp_embed);
    f(t.enorm, p + "enorm.weight", Shape{d}, Role::norm);
    f(t.hnorm, p + "hnorm.weight", Shape{d}, Role::norm);
    f(t.eh_proj, p + "eh_proj.weight", Shape{d, 2 * d}, Role::eh_proj);
    walk_layer(t.layer, c, l, f);
    f(t.shared_head_norm, p + "shared_head.norm.weight", Shape{d}, Role::norm);
    f(t.shared_head_head, p + "shared_head.head.weight", Shape{V, d}, Role::mtp_head);
  }
}

}  // namespace v3b::model
