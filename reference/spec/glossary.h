// The one glossary of dimension names (SPEC 0.1). Field names in shapes and configs are these.
//   T tokens in a call; B sequences; s key length; s0 already cached length
//   d hidden_size; n_h num_attention_heads; n_kv key/value heads (GQA)
//   d_n qk_nope_head_dim; d_r qk_rope_head_dim; d_v v_head_dim; d_qk = d_n + d_r
//   d_c kv_lora_rank; d_q q_lora_rank (0: none)
//   E n_routed_experts; K num_experts_per_tok; N_s n_shared_experts; G n_group; M topk_group
//   m moe_intermediate_size; f intermediate_size (dense); c_r routed_scaling_factor
//   L num_hidden_layers; L_d first_k_dense_replace; D num_nextn_predict_layers; V vocab_size
// Linear weights are row-major [out, in], y = x W^T, no biases. FLOPs count a multiply-add as 2.
#pragma once
#include <cstdint>
