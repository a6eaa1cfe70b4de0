// Exact counting from a configuration: parameters (SPEC 0.3), checkpoint size, weight traffic, KV
// cache bytes (SPEC 0.4). Plain integers, no allocation of weights. Throws v3b::Error when a count
// exceeds 63 bits.
#pragma once
#include <cstdint>

#include "model/config.h"

namespace v3b::model {

struct LayerParams {           // one transformer layer, elements
  int64_t attention = 0;       // q_proj | q_a, q_b; kv_a, kv_b, o
  int64_t norms = 0;           // input, post_attention, q_a, kv_a
  int64_t dense_ffn = 0;       // 0 in MoE layers
  int64_t gate = 0, bias = 0;  // router
  int64_t expert = 0;          // one routed expert
  int64_t experts = 0;         // number of routed experts (E, or 0)
  int64_t active_experts = 0;  // K, or 0
  int64_t shared = 0;          // all shared experts together
  int64_t total() const;
  int64_t active() const;  // what one token uses
};
LayerParams layer_params(const ModelConfig& c,
                         int64_t layer);  // layer >= num_hidden_layers: MTP's layer

struct ParamCounts {
  int64_t embedding = 0;   // = head
  int64_t main_total = 0;  // embedding and head included (head once more only if not tied)
  int64_t active = 0;      // per token, incl. embedding and head
  int64_t active_excl_embedding = 0;
  int64_t active_excl_both = 0;
  int64_t mtp_unique = 0;  // all MTP layers: transformer layer + eh_proj + 3 norms
  int64_t mtp_stored = 0;  // with their stored copies of embedding and head
  int64_t mtp_active_unique = 0, mtp_active = 0;  // per token of one pass through all MTP layers
};
ParamCounts count_params(const ModelConfig& c);

// A checkpoint as SPEC 2.1 stores it: config.fp8 -> Q matrices FP8 with F32 scales, otherwise BF16;
// the bias F32; MTP layers with their copies. entries = tensors in the files.
struct CheckpointSize {
  int64_t main_entries = 0, mtp_entries = 0, scale_entries = 0;
  int64_t fp8 = 0, bf16 = 0, f32 = 0;  // elements
  int64_t elements() const { return fp8 + bf16 + f32; }
  int64_t bytes() const { return fp8 + 2 * bf16 + 4 * f32; }
};
CheckpointSize checkpoint_size(const ModelConfig& c);

// Stored bytes: fp8 as above, else all BF16 but the F32 bias.
int64_t matrix_bytes(int64_t rows, int64_t cols, bool fp8);  // a Q matrix with its scales
int64_t attention_bytes(const ModelConfig& c, bool fp8);     // matrices only
int64_t expert_bytes(const ModelConfig& c, bool fp8);        // one routed expert
int64_t layer_bytes(const ModelConfig& c, int64_t layer, bool fp8);
// Weight bytes that a decode step of one token reads.
int64_t layer_decode_bytes(const ModelConfig& c, int64_t layer, bool fp8);
int64_t decode_bytes(const ModelConfig& c,
                     bool fp8);  // all layers, final norm, head (BF16), one embedding row
// Expected number of distinct routed experts for `tokens` tokens with uniform routing:
// E(1-(1-K/E)^tokens).
double expected_distinct_experts(const ModelConfig& c, int64_t tokens);

enum class KvScheme {
  mha_expanded,  // n_h keys of d_qk and values of d_v ("naive" cache of MLA)
  mha,           // n_h keys of d_n and values of d_v
  gqa,           // `groups` keys and values
  mqa,           // one
  mla,           // d_c latent + d_r rope key
  tpa            // (R_K+R_V)(n_h+d_v) with R_K = R_V = groups
};
enum class KvElem {
  f32,
  bf16,
  f16,
  fp8
};  // fp8: E4M3 with an F32 scale per 128 elements; MLA keeps rope in BF16
const char* kv_scheme_name(KvScheme s);
const char* kv_elem_name(KvElem e);
// `groups` counts for gqa and tpa only.
int64_t kv_cache_elements_per_layer(KvScheme s, const ModelConfig& c, int64_t groups = 1);
int64_t kv_cache_bytes_per_layer(KvScheme s, const ModelConfig& c, KvElem e, int64_t groups = 1);
// One token in all num_hidden_layers layers, plus the MTP layers if asked.
int64_t kv_cache_bytes_per_token(KvScheme s, const ModelConfig& c, KvElem e, int64_t groups = 1,
                                 bool with_mtp = false);

}  // namespace v3b::model
