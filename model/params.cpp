// Counting, by the same walk over SPEC 2.1 that binds weights; per-layer results are multiplied,
// not repeated.
#include "model/params.h"

#include <cmath>

#include "model/error.h"
#include "model/weights_walk.h"

namespace v3b::model {

namespace {

__extension__ typedef __int128 i128;

int64_t narrow(i128 v) {
  if (v > INT64_MAX)
    throw Error(ExitCode::bad_input, "model size", "config", "counts below 2^63", "more");
  return static_cast<int64_t>(v);
}
int64_t mul(int64_t a, int64_t b) { return narrow(static_cast<i128>(a) * b); }
int64_t add(int64_t a, int64_t b) { return narrow(static_cast<i128>(a) + b); }
int64_t numel(const Shape& s) {
  int64_t n = 1;
  for (const int64_t v : s) n = mul(n, v);
  return n;
}
int64_t blocks(const Shape& s) { return mul((s[0] + 127) / 128, (s[1] + 127) / 128); }

// One layer with a single expert walked; the caller multiplies. F(name, shape, role, count).
template <class F>
void each_kind(const ModelConfig& c, int64_t layer, F&& visit) {
  ModelConfig one = c;
  one.n_routed_experts = 1;
  const bool moe = c.is_moe_layer(layer);
  LayerWeights w;
  auto f = [&](TensorView&, const std::string& name, Shape shape, Role role) {
    const bool routed = name.find(".experts.") != std::string::npos;
    if (role == Role::gate || role == Role::bias) shape[0] = c.n_routed_experts;
    visit(name, shape, role, routed ? c.n_routed_experts : 1);
  };
  walk_layer(w, one, layer, f);
  if (w.is_moe != moe)
    throw Error(ExitCode::bad_input, "layer kind", "config", "agreement", "none");
}

void add_tensor(CheckpointSize& s, int64_t& entries, const Shape& shape, Role role, int64_t count,
                bool fp8) {
  entries = add(entries, count);
  const int64_t n = mul(numel(shape), count);
  if (role == Role::quantisable && fp8) {
    s.fp8 = add(s.fp8, n);
    s.f32 = add(s.f32, mul(blocks(shape), count));
    s.scale_entries = add(s.scale_entries, count);
  } else if (role == Role::bias) {
    s.f32 = add(s.f32, n);
  } else {
    s.bf16 = add(s.bf16, n);
  }
}

CheckpointSize layer_size(const ModelConfig& c, int64_t layer, bool fp8, bool active_only) {
  CheckpointSize s;
  each_kind(c, layer, [&](const std::string&, const Shape& shape, Role role, int64_t count) {
    if (active_only && count > 1) count = c.num_experts_per_tok;
    add_tensor(s, s.main_entries, shape, role, count, fp8);
  });
  return s;
}

}  // namespace

int64_t LayerParams::total() const {
  return add(add(attention, norms),
             add(add(dense_ffn, add(gate, bias)), add(mul(expert, experts), shared)));
}
int64_t LayerParams::active() const {
  return add(add(attention, norms),
             add(add(dense_ffn, add(gate, bias)), add(mul(expert, active_experts), shared)));
}

LayerParams layer_params(const ModelConfig& c, int64_t layer) {
  LayerParams p;
  each_kind(c, layer, [&](const std::string& name, const Shape& shape, Role role, int64_t) {
    const int64_t n = numel(shape);
    if (role == Role::norm)
      p.norms = add(p.norms, n);
    else if (role == Role::gate)
      p.gate = n;
    else if (role == Role::bias)
      p.bias = n;
    else if (name.find("self_attn.") != std::string::npos)
      p.attention = add(p.attention, n);
    else if (name.find(".shared_experts.") != std::string::npos)
      p.shared = add(p.shared, n);
    else if (name.find(".experts.") != std::string::npos)
      p.expert = add(p.expert, n);
    else
      p.dense_ffn = add(p.dense_ffn, n);
  });
  if (p.expert) {
    p.experts = c.n_routed_experts;
    p.active_experts = c.num_experts_per_tok;
  }
  return p;
}

ParamCounts count_params(const ModelConfig& c) {
  ParamCounts p;
  const int64_t d = c.hidden_size, L = c.num_hidden_layers, D = c.num_nextn_predict_layers;
  p.embedding = mul(c.vocab_size, d);
  int64_t moe_layers = 0;
  for (int64_t l = 0; l < L; ++l) moe_layers += c.is_moe_layer(l);
  const LayerParams moe = layer_params(c, L);  // an MTP layer is an MoE layer
  int64_t dense_total = 0;
  if (moe_layers < L) {
    int64_t first = 0;
    while (c.is_moe_layer(first)) ++first;
    dense_total = mul(layer_params(c, first).total(), L - moe_layers);
  }
  const int64_t layers_total = add(dense_total, mul(moe.total(), moe_layers));
  const int64_t layers_active = add(dense_total, mul(moe.active(), moe_layers));
  const int64_t head = c.tie_word_embeddings ? 0 : p.embedding;
  p.main_total = add(add(layers_total, d), add(p.embedding, head));
  p.active_excl_both = add(layers_active, d);
  p.active_excl_embedding = add(p.active_excl_both, p.embedding);
  p.active =
      c.tie_word_embeddings ? p.active_excl_embedding : add(p.active_excl_embedding, p.embedding);
  const int64_t extra = add(mul(mul(2, d), d), mul(3, d));
  p.mtp_unique = mul(D, add(moe.total(), extra));
  p.mtp_stored = add(p.mtp_unique, mul(D, mul(2, p.embedding)));
  p.mtp_active_unique = mul(D, add(moe.active(), extra));
  p.mtp_active = add(p.mtp_active_unique, mul(D, mul(2, p.embedding)));
  return p;
}

CheckpointSize checkpoint_size(const ModelConfig& c) {
  CheckpointSize s;
  const Shape embed{c.vocab_size, c.hidden_size}, norm{c.hidden_size},
      eh{c.hidden_size, 2 * c.hidden_size};
  auto layer = [&](int64_t l, int64_t& entries) {
    each_kind(c, l, [&](const std::string&, const Shape& shape, Role role, int64_t count) {
      add_tensor(s, entries, shape, role, count, c.fp8);
    });
  };
  add_tensor(s, s.main_entries, embed, Role::embed, c.tie_word_embeddings ? 1 : 2, c.fp8);
  add_tensor(s, s.main_entries, norm, Role::norm, 1, c.fp8);
  for (int64_t l = 0; l < c.num_hidden_layers; ++l) layer(l, s.main_entries);
  for (int64_t k = 0; k < c.num_nextn_predict_layers; ++k) {
    layer(c.num_hidden_layers + k, s.mtp_entries);
    add_tensor(s, s.mtp_entries, embed, Role::embed, 2, c.fp8);
    add_tensor(s, s.mtp_entries, norm, Role::norm, 3, c.fp8);
    add_tensor(s, s.mtp_entries, eh, Role::eh_proj, 1, c.fp8);
  }
  return s;
}

int64_t matrix_bytes(int64_t rows, int64_t cols, bool fp8) {
  const Shape s{rows, cols};
  return fp8 ? add(numel(s), mul(4, blocks(s))) : mul(2, numel(s));
}
int64_t attention_bytes(const ModelConfig& c, bool fp8) {
  int64_t bytes = 0;
  each_kind(c, 0, [&](const std::string& name, const Shape& shape, Role role, int64_t) {
    if (role == Role::quantisable && name.find("self_attn.") != std::string::npos)
      bytes = add(bytes, matrix_bytes(shape[0], shape[1], fp8));
  });
  return bytes;
}
int64_t expert_bytes(const ModelConfig& c, bool fp8) {
  const int64_t d = c.hidden_size, m = c.moe_intermediate_size;
  return add(mul(2, matrix_bytes(m, d, fp8)), matrix_bytes(d, m, fp8));
}
int64_t layer_bytes(const ModelConfig& c, int64_t layer, bool fp8) {
  return layer_size(c, layer, fp8, false).bytes();
}
int64_t layer_decode_bytes(const ModelConfig& c, int64_t layer, bool fp8) {
  return layer_size(c, layer, fp8, true).bytes();
}
int64_t decode_bytes(const ModelConfig& c, bool fp8) {
  int64_t bytes = 0;
  for (int64_t l = 0; l < c.num_hidden_layers; ++l)
    bytes = add(bytes, layer_decode_bytes(c, l, fp8));
  const int64_t row = 2 * c.hidden_size;
  return add(bytes, add(mul(row, c.vocab_size), 2 * row));
}

double expected_distinct_experts(const ModelConfig& c, int64_t tokens) {
  const auto E = static_cast<double>(c.n_routed_experts),
             K = static_cast<double>(c.num_experts_per_tok);
  return E * (1 - std::pow(1 - K / E, static_cast<double>(tokens)));
}

const char* kv_scheme_name(KvScheme s) {
  switch (s) {
    case KvScheme::mha_expanded:
      return "mla_expanded";
    case KvScheme::mha:
      return "mha";
    case KvScheme::gqa:
      return "gqa";
    case KvScheme::mqa:
      return "mqa";
    case KvScheme::mla:
      return "mla";
    case KvScheme::tpa:
      return "tpa";
  }
  return "?";
}
const char* kv_elem_name(KvElem e) {
  switch (e) {
    case KvElem::f32:
      return "f32";
    case KvElem::bf16:
      return "bf16";
    case KvElem::f16:
      return "f16";
    case KvElem::fp8:
      return "fp8";
  }
  return "?";
}

int64_t kv_cache_elements_per_layer(KvScheme s, const ModelConfig& c, int64_t groups) {
  const int64_t nh = c.num_attention_heads, pair = c.qk_nope_head_dim + c.v_head_dim;
  switch (s) {
    case KvScheme::mha_expanded:
      return nh * (c.qk_head_dim() + c.v_head_dim);
    case KvScheme::mha:
      return nh * pair;
    case KvScheme::gqa:
      return groups * pair;
    case KvScheme::mqa:
      return pair;
    case KvScheme::mla:
      return c.kv_lora_rank + c.qk_rope_head_dim;
    case KvScheme::tpa:
      return 2 * groups * (nh + c.v_head_dim);
  }
  return 0;
}

int64_t kv_cache_bytes_per_layer(KvScheme s, const ModelConfig& c, KvElem e, int64_t groups) {
  const int64_t n = kv_cache_elements_per_layer(s, c, groups);
  if (e == KvElem::f32) return 4 * n;
  if (e != KvElem::fp8) return 2 * n;
  if (s == KvScheme::mla)
    return c.kv_lora_rank + 4 * ((c.kv_lora_rank + 127) / 128) + 2 * c.qk_rope_head_dim;
  return n + 4 * ((n + 127) / 128);
}

int64_t kv_cache_bytes_per_token(KvScheme s, const ModelConfig& c, KvElem e, int64_t groups,
                                 bool with_mtp) {
  const int64_t layers = c.num_hidden_layers + (with_mtp ? c.num_nextn_predict_layers : 0);
  return mul(kv_cache_bytes_per_layer(s, c, e, groups), layers);
}

}  // namespace v3b::model
