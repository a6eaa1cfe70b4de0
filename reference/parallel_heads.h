// Multi-token prediction with independent heads on a shared trunk (SPEC 1.26), the baseline to the
// sequential MTP of 1.25: head i reads the trunk's states z_t and predicts x_{t+i}. Instantiated
// for float and double.
//
// The heads are the layers of a ModelParams: head i is p.layers[i-1], one whole decoder layer (MLA
// and FFN or MoE, residual connections included). p.norm and p.head_or_embed() are the unembedding,
// shared by all heads (the final norm too: a choice, as in a model whose last layer is head 1).
// p.embed (unless tied) and p.mtp are not read: the trunk is the caller's.
#pragma once
#include <cstdint>
#include <vector>

#include "reference/model_backward.h"

namespace v3b::ref {

// Logits [B*T, V] of head i (1-based) for B sequences of T rows z [B*T, d] at positions 0..T-1.
template <class S>
std::vector<S> parallel_head_logits(const ModelParams<S>& p, int64_t i, int64_t B, int64_t T,
                                    const S* z, const LossOptions& o = {});

struct ParallelHeadsLoss {
  int64_t targets = 0;          // labels of head 1 that are not -100
  std::vector<int64_t> counts;  // [n] the same for every head: head i has no target in the last i-1
                                // positions of a sequence
  std::vector<double> nats;     // [n] sums over the head's labels
  double aux = 0;               // balance loss of the heads' MoE layers, alpha included
  double total = 0;         // sum_i nats_i / targets + aux: every head divided by head 1's count,
                            // as the depths of SPEC 1.27
  double smallest_gap = 0;  // of all routing decisions
  std::vector<std::vector<int64_t>> load;  // [MoE heads][E] assignments
};

// tokens [B, T+1]: head i of position p has target tokens[p+i]; or `targets` [B, T] (what head 1
// predicts, -100 to ignore): head i has targets[p+i-1]. Of LossOptions, mtp_lambda is not used.
// The heads run one after another, forward and backward, so that only one head's logits and
// activations exist at a time. grads (structure of p) and dz [B*T, d] are added to and may be null
// together. Throws v3b::Error(bad_input) if p has no layers, T < number of heads, or only one of
// grads and dz is given.
template <class S>
ParallelHeadsLoss parallel_heads_loss(const ModelParams<S>& p, int64_t B, int64_t T, const S* z,
                                      const int32_t* tokens, const int32_t* targets,
                                      const LossOptions& o, ModelParams<S>* grads, S* dz);

}  // namespace v3b::ref
