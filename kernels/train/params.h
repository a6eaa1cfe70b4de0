// The trainable parameters of a V3-shaped model as one flat array. Every parameter bears its
// checkpoint name (SPEC 2.1); neighbours that are multiplied by the same input stand side by side
// (q_a | kv_a, gate | up), so that one GEMM serves both.
#pragma once
#include <cstdint>
#include <string>
#include <vector>

#include "model/config.h"

namespace v3b::kern::train {

struct Param {
  std::string name;            // e.g. model.layers.1.mlp.experts.3.up_proj.weight
  std::vector<int64_t> shape;  // [out, in] or [n]
  int64_t offset = 0;          // elements into the flat array
  bool matrix = false;  // weight decay applies (SPEC 3.12), N(0, initializer_range^2) at start
  int64_t numel() const {
    int64_t n = 1;
    for (int64_t s : shape) n *= s;
    return n;
  }
};

struct FfnRef {
  int64_t gate_up = -1;  // [2*width, d]: gate rows, then up rows
  int64_t down = -1;     // [d, width]
  int64_t width = 0;     // 0: absent
};
struct LayerRef {       // offsets into the flat array
  std::string prefix;   // "model.layers.3."
  int64_t in_norm = 0;  // [d]
  int64_t a_proj = 0;   // [q_width + d_c + d_r, d]; q_width = d_q, or n_h*d_qk without compression
  int64_t q_norm = -1;  // [d_q]
  int64_t q_b = -1;     // [n_h*d_qk, d_q]
  int64_t kv_norm = 0;  // [d_c]
  int64_t kv_b = 0;     // [n_h*(d_n+d_v), d_c]
  int64_t o = 0;        // [d, n_h*d_v]
  int64_t post_norm = 0;  // [d]
  bool moe = false;
  int64_t moe_index = -1;  // place among the MoE layers, MTP's last
  FfnRef ffn;              // dense layer's, or the shared experts'
  int64_t router = -1;     // [E, d]
  int64_t experts = -1;    // expert e: gate | up | down from experts + e*expert_stride
  int64_t expert_stride = 0;
};
struct ParamTable {
  std::vector<Param> params;
  std::vector<LayerRef> layers;  // main layers, then the MTP layer if the model has one
  int64_t embed = 0, norm = 0, lm_head = 0;
  bool mtp = false;
  int64_t enorm = -1, hnorm = -1, eh_proj = -1, head_norm = -1;
  int64_t moe_layers = 0;  // MoE layers including MTP's
  int64_t total = 0;       // elements, padding included
  int64_t trainable = 0;   // elements without padding
  const Param* find(const std::string& name) const;
};
// Throws v3b::Error (bad_input) for shapes that the trainer does not do: softmax scoring, more than
// one MTP module, tied embeddings.
ParamTable make_param_table(const model::ModelConfig& c);

// FLOPs of one trained token: 2 * matrices forward, twice that backward, attention core at a mean
// of context/2 keys (backward with the recomputed scores). Routed experts count K of E.
double train_flops_per_token(const model::ModelConfig& c, int64_t context);

}  // namespace v3b::kern::train
