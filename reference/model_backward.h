// Loss of a whole model (main, MTP, balance) and the gradient of every tensor, composed of the
// component backwards (SPEC 1.17, 1.25, 1.27, 3). What training kernels are compared with.
// Instantiated for float and double.
#pragma once
#include <cstdint>
#include <vector>

#include "reference/forward_params.h"
#include "reference/spec/flags.h"

namespace v3b::ref {

enum class BalanceLoss { none, switch_loss, sequence };

struct LossOptions {
  double mtp_lambda = 0.3;
  BalanceLoss balance = BalanceLoss::none;  // of every MoE layer, the MTP layers' included
  double alpha = 1e-4;
  spec::Flags
      flags;  // balance_f, mtp_hidden, mtp_concat and the router flags; no bf16 roundings here
};

struct LossParts {
  int64_t targets = 0;            // labels != -100
  double nats = 0, mtp_nats = 0;  // sums; mtp_nats over all depths
  double aux = 0;                 // sum over MoE layers, alpha included
  double total = 0;               // nats/targets + lambda/D * mtp_nats/targets + aux
  double smallest_gap =
      0;  // of all routing decisions: finite differences need it well above the step
  std::vector<std::vector<int64_t>> load;  // [MoE layer, MTP's last][E] assignments
};

// tokens [B, T+1]: inputs 0..T-1, targets 1..T, or `targets` [B, T] with -100 to ignore. Depth k of
// MTP has rows p < T-k: it embeds tokens[p+k] and predicts targets[p+k] (SPEC 1.27); its loss is
// divided by the main targets. sequence: L = alpha sum f P of each sequence, mean over sequences;
// switch: softmax(z) over the whole batch. grads, if not null, has the structure of p (zeros_like)
// and is added to. The selection bias gets none.
template <class S>
LossParts model_loss(const ModelParams<S>& p, int64_t B, int64_t T, const int32_t* tokens,
                     const int32_t* targets, const LossOptions& o, ModelParams<S>* grads);

}  // namespace v3b::ref
