#include "kernels/forward/packed.h"

#include <cstring>

#include "kernels/gemm/gemm.h"

namespace v3b::kern {
namespace {

using model::TensorView;

// Floats to the compute dtype at dst.
void put(const std::vector<float>& f, spec::DType dtype, uint8_t* dst) {
  if (dtype == spec::DType::f32) {
    std::memcpy(dst, f.data(), f.size() * sizeof(float));
  } else {
    convert_f32_to_bf16(f.data(), reinterpret_cast<spec::bf16*>(dst),
                        static_cast<int64_t>(f.size()));
  }
}
// The given matrices one under the other.
Linear stack(std::initializer_list<const TensorView*> parts, spec::DType dtype) {
  Linear l;
  for (const TensorView* t : parts) l.out += t->rows(), l.in = t->cols();
  l.data = Buffer<uint8_t>(l.out * l.in * spec::dtype_bytes(dtype));
  int64_t at = 0;
  for (const TensorView* t : parts) {
    put(model::to_float_vector(*t), dtype, l.data.data() + at);
    at += t->numel() * spec::dtype_bytes(dtype);
  }
  return l;
}
Buffer<float> floats(const TensorView& t) {
  if (!t.present()) return {};
  const std::vector<float> f = model::to_float_vector(t);
  Buffer<float> b(t.numel());
  std::memcpy(b.data(), f.data(), f.size() * sizeof(float));
  return b;
}

void pack_experts(const model::MoeWeights& w, spec::DType dtype, PackedLayer& p) {
  std::vector<const model::FfnWeights*> all;
  for (const auto& e : w.experts) all.push_back(&e);
  if (w.shared.gate_proj.present()) all.push_back(&w.shared);
  int64_t total = 0;
  for (const auto* e : all)
    total += e->gate_proj.numel() + e->up_proj.numel() + e->down_proj.numel();
  p.experts = Buffer<uint8_t>(total * spec::dtype_bytes(dtype));
  uint8_t* at = p.experts.data();
  const auto place = [&](const TensorView& t) {
    uint8_t* here = at;
    put(model::to_float_vector(t), dtype, here);
    at += t.numel() * spec::dtype_bytes(dtype);
    return here;
  };
  for (const auto* e : all) {
    spec::FfnPointers f{};
    f.gate = place(e->gate_proj);
    f.up = place(e->up_proj);
    f.down = place(e->down_proj);
    if (e == &w.shared) {
      p.shared_ptrs = f;
    } else {
      p.expert_ptrs.push_back(f);
    }
  }
}

PackedLayer pack_layer(const model::ModelConfig& c, const model::LayerWeights& w, spec::DType dtype,
                       bool router_bf16) {
  PackedLayer p;
  p.input_norm = floats(w.input_layernorm);
  p.post_norm = floats(w.post_attention_layernorm);
  p.q_a_norm = floats(w.attn.q_a_layernorm);
  p.kv_a_norm = floats(w.attn.kv_a_layernorm);
  if (c.q_lora_rank > 0) {
    p.a_proj = stack({&w.attn.q_a_proj, &w.attn.kv_a_proj_with_mqa}, dtype);
    p.q_b = stack({&w.attn.q_b_proj}, dtype);
  } else {
    p.a_proj = stack({&w.attn.q_proj, &w.attn.kv_a_proj_with_mqa}, dtype);
  }
  p.kv_b = stack({&w.attn.kv_b_proj}, dtype);
  p.o_proj = stack({&w.attn.o_proj}, dtype);
  const int64_t n_h = c.num_attention_heads, d_n = c.qk_nope_head_dim, d_v = c.v_head_dim,
                d_c = c.kv_lora_rank;
  const int64_t e = spec::dtype_bytes(dtype);
  p.uk_t.out = n_h * d_c;
  p.uk_t.in = d_n;
  p.uk_t.data = Buffer<uint8_t>(n_h * d_c * d_n * e);
  for (int64_t h = 0; h < n_h; ++h)
    for (int64_t r = 0; r < d_n; ++r)
      for (int64_t i = 0; i < d_c; ++i)
        std::memcpy(p.uk_t.data.data() + ((h * d_c + i) * d_n + r) * e,
                    p.kv_b.data.data() + ((h * (d_n + d_v) + r) * d_c + i) * e,
                    static_cast<size_t>(e));
  p.is_moe = w.is_moe;
  if (!w.is_moe) {
    p.gate_up = stack({&w.mlp.gate_proj, &w.mlp.up_proj}, dtype);
    p.down = stack({&w.mlp.down_proj}, dtype);
    return p;
  }
  p.router = floats(w.moe.gate);
  if (router_bf16) p.router_bf16 = stack({&w.moe.gate}, spec::DType::bf16);
  p.bias = floats(w.moe.e_score_correction_bias);
  pack_experts(w.moe, dtype, p);
  return p;
}

bool same_bytes(const TensorView& a, const TensorView& b) {
  if (a.data == b.data) return true;
  return a.dtype == b.dtype && a.shape == b.shape &&
         std::memcmp(a.data, b.data, static_cast<size_t>(a.numel() * spec::dtype_bytes(a.dtype))) ==
             0;
}

}  // namespace

PackedModel pack_model(const model::ModelWeights& w, spec::DType dtype, bool router_bf16) {
  PackedModel p;
  p.dtype = dtype;
  p.embed = stack({&w.embed_tokens}, dtype);
  if (!w.config.tie_word_embeddings) p.head = stack({&w.lm_head}, dtype);
  p.norm = floats(w.norm);
  for (const auto& l : w.layers) p.layers.push_back(pack_layer(w.config, l, dtype, router_bf16));
  for (const auto& m : w.mtp) {
    PackedMtp q;
    q.enorm = floats(m.enorm);
    q.hnorm = floats(m.hnorm);
    q.norm = floats(m.shared_head_norm);
    q.eh_proj = stack({&m.eh_proj}, dtype);
    q.layer = pack_layer(w.config, m.layer, dtype, router_bf16);
    if (m.embed_tokens.present() && !same_bytes(m.embed_tokens, w.embed_tokens))
      q.own_embed = stack({&m.embed_tokens}, dtype);
    const TensorView& main_head = w.config.tie_word_embeddings ? w.embed_tokens : w.lm_head;
    if (m.shared_head_head.present() && !same_bytes(m.shared_head_head, main_head))
      q.own_head = stack({&m.shared_head_head}, dtype);
    p.mtp.push_back(std::move(q));
  }
  return p;
}

}  // namespace v3b::kern
