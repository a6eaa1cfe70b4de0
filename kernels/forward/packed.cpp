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
struct How {
  spec::DType dtype;
  bool router_bf16, keep_fp8, borrow;
};
bool lies_ready(const TensorView& t, const How& how) {
  return how.borrow && t.dtype == how.dtype &&
         reinterpret_cast<uintptr_t>(t.data) % kBufferAlign == 0;
}
// The given matrices one under the other.
Linear stack(std::initializer_list<const TensorView*> parts, const How& how) {
  const spec::DType dtype = how.dtype;
  Linear l;
  if (const TensorView& only = **parts.begin(); parts.size() == 1 && lies_ready(only, how)) {
    l.out = only.rows(), l.in = only.cols();
    l.borrowed = static_cast<const uint8_t*>(only.data);
    return l;
  }
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

int64_t scales_of(const TensorView& t) { return (t.rows() + 127) / 128 * ((t.cols() + 127) / 128); }

void pack_experts(const model::MoeWeights& w, const How& how, PackedLayer& p) {
  std::vector<const model::FfnWeights*> all;
  for (const auto& e : w.experts) all.push_back(&e);
  if (w.shared.gate_proj.present()) all.push_back(&w.shared);
  int64_t total = 0, scales = 0;
  bool fp8 = how.keep_fp8 && how.dtype == spec::DType::bf16;
  for (const auto* e : all)
    for (const TensorView* t : {&e->gate_proj, &e->up_proj, &e->down_proj})
      fp8 = fp8 && t->dtype == spec::DType::f8e4m3;
  How stored = how;
  stored.dtype = p.expert_type = fp8 ? spec::DType::f8e4m3 : how.dtype;
  for (const auto* e : all)
    for (const TensorView* t : {&e->gate_proj, &e->up_proj, &e->down_proj})
      if (!lies_ready(*t, stored)) total += t->numel(), scales += fp8 ? scales_of(*t) : 0;
  p.experts = Buffer<uint8_t>(total * spec::dtype_bytes(p.expert_type));
  p.expert_scales = Buffer<float>(scales);
  uint8_t* at = p.experts.data();
  float* scale_at = p.expert_scales.data();
  const auto place = [&](const TensorView& t, const float*& scale) -> const void* {
    if (lies_ready(t, stored)) {
      scale = t.scale_inv;
      return t.data;
    }
    uint8_t* here = at;
    if (fp8) {
      std::memcpy(here, t.data, static_cast<size_t>(t.numel()));
      std::memcpy(scale_at, t.scale_inv, static_cast<size_t>(scales_of(t)) * sizeof(float));
      scale = scale_at;
      scale_at += scales_of(t);
    } else {
      put(model::to_float_vector(t), how.dtype, here);
    }
    at += t.numel() * spec::dtype_bytes(p.expert_type);
    return here;
  };
  for (const auto* e : all) {
    spec::FfnPointers f{};
    f.gate = place(e->gate_proj, f.gate_scale);
    f.up = place(e->up_proj, f.up_scale);
    f.down = place(e->down_proj, f.down_scale);
    if (e == &w.shared) {
      p.shared_ptrs = f;
    } else {
      p.expert_ptrs.push_back(f);
    }
  }
}

PackedLayer pack_layer(const model::ModelConfig& c, const model::LayerWeights& w, const How& how) {
  PackedLayer p;
  p.input_norm = floats(w.input_layernorm);
  p.post_norm = floats(w.post_attention_layernorm);
  p.q_a_norm = floats(w.attn.q_a_layernorm);
  p.kv_a_norm = floats(w.attn.kv_a_layernorm);
  if (c.q_lora_rank > 0) {
    p.a_proj = stack({&w.attn.q_a_proj, &w.attn.kv_a_proj_with_mqa}, how);
    p.q_b = stack({&w.attn.q_b_proj}, how);
  } else {
    p.a_proj = stack({&w.attn.q_proj, &w.attn.kv_a_proj_with_mqa}, how);
  }
  p.kv_b = stack({&w.attn.kv_b_proj}, how);
  p.o_proj = stack({&w.attn.o_proj}, how);
  p.is_moe = w.is_moe;
  if (!w.is_moe) {
    p.gate_up = stack({&w.mlp.gate_proj, &w.mlp.up_proj}, how);
    p.down = stack({&w.mlp.down_proj}, how);
    return p;
  }
  p.router = floats(w.moe.gate);
  if (how.router_bf16)
    p.router_bf16 = stack({&w.moe.gate}, {spec::DType::bf16, true, false, false});
  p.bias = floats(w.moe.e_score_correction_bias);
  pack_experts(w.moe, how, p);
  return p;
}

bool same_bytes(const TensorView& a, const TensorView& b) {
  if (a.data == b.data) return true;
  return a.dtype == b.dtype && a.shape == b.shape &&
         std::memcmp(a.data, b.data, static_cast<size_t>(a.numel() * spec::dtype_bytes(a.dtype))) ==
             0;
}

}  // namespace

PackedModel pack_model(const model::WeightsPtr& weights, spec::DType dtype, bool router_bf16,
                       bool keep_fp8_experts, bool borrow) {
  const model::ModelWeights& w = *weights;
  const How how{dtype, router_bf16, keep_fp8_experts, borrow && w.in_place};
  PackedModel p;
  if (how.borrow) p.source = weights;
  p.dtype = dtype;
  p.embed = stack({&w.embed_tokens}, how);
  if (!w.config.tie_word_embeddings) p.head = stack({&w.lm_head}, how);
  p.norm = floats(w.norm);
  for (const auto& l : w.layers) p.layers.push_back(pack_layer(w.config, l, how));
  for (const auto& m : w.mtp) {
    PackedMtp q;
    q.enorm = floats(m.enorm);
    q.hnorm = floats(m.hnorm);
    q.norm = floats(m.shared_head_norm);
    q.eh_proj = stack({&m.eh_proj}, how);
    q.layer = pack_layer(w.config, m.layer, how);
    if (m.embed_tokens.present() && !same_bytes(m.embed_tokens, w.embed_tokens))
      q.own_embed = stack({&m.embed_tokens}, how);
    const TensorView& main_head = w.config.tie_word_embeddings ? w.embed_tokens : w.lm_head;
    if (m.shared_head_head.present() && !same_bytes(m.shared_head_head, main_head))
      q.own_head = stack({&m.shared_head_head}, how);
    p.mtp.push_back(std::move(q));
  }
  return p;
}

void pack_for_cpu(const model::ModelConfig& c, PackedModel& p) {
  const auto pack = [&](Linear& l, bool keep_rows = false) {
    if (l.out == 0) return;
    l.packed = PackedMatrix({p.dtype, l.bytes(), l.in, false, l.out, l.in});
    if (keep_rows) return;
    l.data = {};
    l.borrowed = nullptr;
  };
  const auto pack_all = [&](PackedLayer& l) {
    const int64_t n_h = c.num_attention_heads, d_n = c.qk_nope_head_dim, d_v = c.v_head_dim;
    const int64_t d_c = c.kv_lora_rank, head = (d_n + d_v) * d_c;
    const uint8_t* w_uv = l.kv_b.bytes() + d_n * d_c * spec::dtype_bytes(p.dtype);
    l.w_uk = PackedHeads({p.dtype, n_h, d_c, d_n, l.kv_b.bytes(), d_c, head, true});
    l.w_uv = PackedHeads({p.dtype, n_h, d_v, d_c, w_uv, d_c, head, false});
    for (Linear* m : {&l.a_proj, &l.q_b, &l.kv_b, &l.o_proj, &l.gate_up, &l.down}) pack(*m);
    if (!l.is_moe) return;
    const bool shared = l.shared_ptrs.gate != nullptr;
    l.packed_experts =
        PackedExperts({.d = c.hidden_size,
                       .m = c.moe_intermediate_size,
                       .E = static_cast<int64_t>(l.expert_ptrs.size()),
                       .shared_m = shared ? c.n_shared_experts * c.moe_intermediate_size : 0,
                       .type = l.expert_type},
                      l.expert_ptrs.data(), l.shared_ptrs);
    l.expert_ptrs.clear();
    l.shared_ptrs = {};
    l.experts = {};
    l.expert_scales = {};
  };
  pack(p.embed.out > 0 && p.head.out == 0 ? p.embed : p.head, p.head.out == 0);
  for (PackedLayer& l : p.layers) pack_all(l);
  for (PackedMtp& m : p.mtp) {
    pack(m.eh_proj);
    pack(m.own_head);
    pack_all(m.layer);
  }
}

}  // namespace v3b::kern
