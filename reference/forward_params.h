// All tensors of a model as plain vectors of S, for the reference forward and backward. Gradients
// have the same struct. Names of the fields follow model/weights.h.
#pragma once
#include <functional>
#include <string>
#include <vector>

#include "model/weights.h"

namespace v3b::ref {

template <class S>
struct FfnParams {
  std::vector<S> gate, up, down;  // [m,d] [m,d] [d,m]
};
template <class S>
struct LayerParams {
  std::vector<S> input_norm, post_norm;  // [d]
  std::vector<S> q_proj;                 // only if q_lora_rank == 0
  std::vector<S> q_a, q_a_norm, q_b;
  std::vector<S> kv_a, kv_a_norm, kv_b, o;
  bool is_moe = false;
  FfnParams<S> mlp;             // dense layers
  std::vector<S> router, bias;  // [E,d] [E]
  std::vector<FfnParams<S>> experts;
  FfnParams<S> shared;  // empty vectors if n_shared_experts == 0
};
template <class S>
struct MtpParams {
  std::vector<S> enorm, hnorm, eh_proj, norm;  // norm: shared_head.norm
  LayerParams<S> layer;
  std::vector<S> own_embed, own_head;  // empty: shared with the main model
};
template <class S>
struct ModelParams {
  model::ModelConfig config;
  std::vector<S> embed, norm, head;  // head empty: tied to embed
  std::vector<LayerParams<S>> layers;
  std::vector<MtpParams<S>> mtp;
  const std::vector<S>& head_or_embed() const { return head.empty() ? embed : head; }
  std::vector<S>& head_or_embed() { return head.empty() ? embed : head; }
};

// Dequantised copy. MTP copies of embedding and head whose bytes equal the main ones become shared. Without `experts`
// the routed experts stay empty: of a model of gigabytes they are widened when somebody asks (copy_ffn).
template <class S>
ModelParams<S> make_params(const model::ModelWeights& w, bool experts = true);
template <class S>
FfnParams<S> copy_ffn(const model::FfnWeights& w);
// Same structure, all zeros.
template <class S>
ModelParams<S> zeros_like(const ModelParams<S>& p);
// Every non-empty tensor once with its Hugging Face name.
template <class S>
void for_each_tensor(ModelParams<S>& p,
                     const std::function<void(const std::string&, std::vector<S>&)>& f);

}  // namespace v3b::ref
