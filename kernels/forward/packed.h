// A model's weights as the backends take them: contiguous, aligned, in the compute dtype; norms and router f32. The CUDA
// backend uploads them. The CPU backend packs them once more, for its products (pack_for_cpu); so that this takes no
// second copy it may borrow matrices that lie in memory like that already (ModelWeights::in_place), and FP8 experts stay
// FP8 where it computes in bf16.
#pragma once
#include <vector>

#include "kernels/core/buffer.h"
#include "kernels/gemm/packed_ops.h"
#include "kernels/moe/packed_experts.h"
#include "model/weights.h"
#include "reference/spec/moe_experts.h"

namespace v3b::kern {

struct Linear {  // [out, in] row-major
  int64_t out = 0, in = 0;
  Buffer<uint8_t> data;               // empty where `borrowed` is set
  const uint8_t* borrowed = nullptr;  // in the storage of the model's weights
  PackedMatrix packed;                // after pack_for_cpu(); then bytes() only where rows are read
  const uint8_t* bytes() const { return borrowed != nullptr ? borrowed : data.data(); }
};

struct PackedLayer {
  Buffer<float> input_norm, post_norm, q_a_norm, kv_a_norm;
  Linear a_proj;  // [d_q + d_c + d_r, d]: q_a then kv_a; without q_lora: q in place of q_a
  Linear q_b;     // [n_h d_qk, d_q]; empty without q_lora
  Linear kv_b;    // [n_h (d_n + d_v), d_c]
  Linear o_proj;  // [d, n_h d_v]
  bool is_moe = false;
  Linear gate_up, down;  // dense layers: [2f, d] gate then up; [d, f]
  Buffer<float> router;  // [E, d] f32
  Linear router_bf16;    // only under router_dtype=bf16
  Buffer<float> bias;    // [E] or empty
  Buffer<uint8_t>
      experts;  // gate, up, down of every expert, then the shared expert; empty where they lie in place
  Buffer<float> expert_scales;  // of packed FP8 experts, in the same order
  spec::DType expert_type = spec::DType::bf16;
  std::vector<spec::FfnPointers> expert_ptrs;
  spec::FfnPointers shared_ptrs{};
  PackedHeads w_uk, w_uv;  // after pack_for_cpu(): of absorption, [d_c, d_n] and [d_v, d_c] a head
  PackedExperts packed_experts;  // after pack_for_cpu(), instead of the pointers
};

struct PackedMtp {
  Buffer<float> enorm, hnorm, norm;
  Linear eh_proj;  // [d, 2d]
  PackedLayer layer;
  Linear own_embed, own_head;  // empty: shared with the main model
};

struct PackedModel {
  model::WeightsPtr source;  // what borrowed matrices lie in
  spec::DType dtype = spec::DType::bf16;
  Linear embed;  // [V, d]
  Linear head;   // [V, d]; empty: tied to embed
  Buffer<float> norm;
  std::vector<PackedLayer> layers;
  std::vector<PackedMtp> mtp;
  const Linear& head_or_embed() const { return head.out > 0 ? head : embed; }
};

PackedModel pack_model(const model::WeightsPtr& w, spec::DType dtype, bool router_bf16,
                       bool keep_fp8_experts = false, bool borrow = false);
// Packs the matrices for the CPU's products, on the threads that will read them, and lets go of the row-major copies
// that nothing else reads. Borrowed ones stay in the model's storage: pages of a mapped checkpoint that the system can
// take back.
void pack_for_cpu(const model::ModelConfig& c, PackedModel& p);

}  // namespace v3b::kern
