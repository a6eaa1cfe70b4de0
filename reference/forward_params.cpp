#include "reference/forward_params.h"

#include <algorithm>
#include <type_traits>

namespace v3b::ref {
namespace {

template <class S>
std::vector<S> copy(const model::TensorView& t) {
  if (!t.present()) return {};
  std::vector<float> f = model::to_float_vector(t);
  if constexpr (std::is_same_v<S, float>)
    return f;
  else
    return std::vector<S>(f.begin(), f.end());
}
template <class S>
LayerParams<S> copy_layer(const model::LayerWeights& w, bool experts) {
  LayerParams<S> p;
  p.input_norm = copy<S>(w.input_layernorm);
  p.post_norm = copy<S>(w.post_attention_layernorm);
  p.q_proj = copy<S>(w.attn.q_proj);
  p.q_a = copy<S>(w.attn.q_a_proj);
  p.q_a_norm = copy<S>(w.attn.q_a_layernorm);
  p.q_b = copy<S>(w.attn.q_b_proj);
  p.kv_a = copy<S>(w.attn.kv_a_proj_with_mqa);
  p.kv_a_norm = copy<S>(w.attn.kv_a_layernorm);
  p.kv_b = copy<S>(w.attn.kv_b_proj);
  p.o = copy<S>(w.attn.o_proj);
  p.is_moe = w.is_moe;
  if (!w.is_moe) {
    p.mlp = copy_ffn<S>(w.mlp);
    return p;
  }
  p.router = copy<S>(w.moe.gate);
  p.bias = copy<S>(w.moe.e_score_correction_bias);
  p.experts.resize(w.moe.experts.size());
  for (size_t e = 0; experts && e < p.experts.size(); ++e)
    p.experts[e] = copy_ffn<S>(w.moe.experts[e]);
  p.shared = copy_ffn<S>(w.moe.shared);
  return p;
}

template <class S, class F>
void visit_ffn(FfnParams<S>& w, const std::string& prefix, const F& f) {
  f(prefix + "gate_proj.weight", w.gate);
  f(prefix + "up_proj.weight", w.up);
  f(prefix + "down_proj.weight", w.down);
}
template <class S, class F>
void visit_layer(LayerParams<S>& p, const std::string& prefix, const F& f) {
  f(prefix + "input_layernorm.weight", p.input_norm);
  f(prefix + "post_attention_layernorm.weight", p.post_norm);
  f(prefix + "self_attn.q_proj.weight", p.q_proj);
  f(prefix + "self_attn.q_a_proj.weight", p.q_a);
  f(prefix + "self_attn.q_a_layernorm.weight", p.q_a_norm);
  f(prefix + "self_attn.q_b_proj.weight", p.q_b);
  f(prefix + "self_attn.kv_a_proj_with_mqa.weight", p.kv_a);
  f(prefix + "self_attn.kv_a_layernorm.weight", p.kv_a_norm);
  f(prefix + "self_attn.kv_b_proj.weight", p.kv_b);
  f(prefix + "self_attn.o_proj.weight", p.o);
  visit_ffn(p.mlp, prefix + "mlp.", f);
  f(prefix + "mlp.gate.weight", p.router);
  f(prefix + "mlp.gate.e_score_correction_bias", p.bias);
  for (size_t e = 0; e < p.experts.size(); ++e)
    visit_ffn(p.experts[e], prefix + "mlp.experts." + std::to_string(e) + ".", f);
  visit_ffn(p.shared, prefix + "mlp.shared_experts.", f);
}

}  // namespace

template <class S>
FfnParams<S> copy_ffn(const model::FfnWeights& w) {
  return {copy<S>(w.gate_proj), copy<S>(w.up_proj), copy<S>(w.down_proj)};
}

template <class S>
ModelParams<S> make_params(const model::ModelWeights& w, bool experts) {
  ModelParams<S> p;
  p.config = w.config;
  p.embed = copy<S>(w.embed_tokens);
  p.norm = copy<S>(w.norm);
  if (!w.config.tie_word_embeddings) p.head = copy<S>(w.lm_head);
  for (const auto& l : w.layers) p.layers.push_back(copy_layer<S>(l, experts));
  for (const auto& m : w.mtp) {
    MtpParams<S> q;
    q.enorm = copy<S>(m.enorm);
    q.hnorm = copy<S>(m.hnorm);
    q.eh_proj = copy<S>(m.eh_proj);
    q.norm = copy<S>(m.shared_head_norm);
    q.layer = copy_layer<S>(m.layer, experts);
    if (m.embed_tokens.present() && m.embed_tokens.data != w.embed_tokens.data) {
      q.own_embed = copy<S>(m.embed_tokens);
      if (q.own_embed == p.embed) q.own_embed.clear();
    }
    if (m.shared_head_head.present() && m.shared_head_head.data != w.lm_head.data) {
      q.own_head = copy<S>(m.shared_head_head);
      if (q.own_head == p.head_or_embed()) q.own_head.clear();
    }
    p.mtp.push_back(std::move(q));
  }
  return p;
}

template <class S>
void for_each_tensor(ModelParams<S>& p,
                     const std::function<void(const std::string&, std::vector<S>&)>& f) {
  const std::function<void(const std::string&, std::vector<S>&)> g = [&](const std::string& name,
                                                                         std::vector<S>& v) {
    if (!v.empty()) f(name, v);
  };
  g("model.embed_tokens.weight", p.embed);
  for (size_t l = 0; l < p.layers.size(); ++l)
    visit_layer(p.layers[l], "model.layers." + std::to_string(l) + ".", g);
  g("model.norm.weight", p.norm);
  g("lm_head.weight", p.head);
  for (size_t k = 0; k < p.mtp.size(); ++k) {
    const std::string prefix = "model.layers." + std::to_string(p.layers.size() + k) + ".";
    g(prefix + "enorm.weight", p.mtp[k].enorm);
    g(prefix + "hnorm.weight", p.mtp[k].hnorm);
    g(prefix + "eh_proj.weight", p.mtp[k].eh_proj);
    visit_layer(p.mtp[k].layer, prefix, g);
    g(prefix + "shared_head.norm.weight", p.mtp[k].norm);
    g(prefix + "embed_tokens.weight", p.mtp[k].own_embed);
    g(prefix + "shared_head.head.weight", p.mtp[k].own_head);
  }
}

template <class S>
ModelParams<S> zeros_like(const ModelParams<S>& p) {
  ModelParams<S> z = p;
  for_each_tensor<S>(
      z, [](const std::string&, std::vector<S>& v) { std::fill(v.begin(), v.end(), S(0)); });
  return z;
}

#define V3B_INSTANTIATE(S)                                                  \
  template FfnParams<S> copy_ffn<S>(const model::FfnWeights&);              \
  template ModelParams<S> make_params<S>(const model::ModelWeights&, bool); \
  template ModelParams<S> zeros_like<S>(const ModelParams<S>&);             \
  template void for_each_tensor<S>(                                         \
      ModelParams<S>&, const std::function<void(const std::string&, std::vector<S>&)>&);
V3B_INSTANTIATE(float)
V3B_INSTANTIATE(double)

}  // namespace v3b::ref
