// Balance losses, the loss-free bias update, and load metrics (SPEC 1.17-1.19, 3.7), plain.
#pragma once
#include <cstdint>
#include <vector>

#include "reference/spec/flags.h"

namespace v3b::ref {

// Switch: L = alpha * E * sum_i f_i P_i over T tokens; f over all K assignments (divided by T*K: the minimum is
// alpha for every K), P_i = mean of the full softmax. dprobs [T,E] accumulated if not null.
template <class S>
S switch_loss(int64_t T, int64_t E, int64_t K, const S* probs, const int32_t* idx, S alpha,
              S* dprobs);

// Sequence-wise (V3): one sequence of T tokens. scores [T,E] (sigmoid or softmax, without bias). idx [T,K] are
// the actual routes, used when f_source is routing; otherwise f counts the unbiased, ungrouped top-K of scores.
// dscores [T,E] accumulated if not null (f constant). Batch-wise form: call it with the whole batch as T.
template <class S>
S sequence_loss(int64_t T, int64_t E, int64_t K, const S* scores, const int32_t* idx,
                spec::BalanceF f_source, S alpha, S* dscores);

// b_i += u * sign(mean - c_i), sign(0) = 0.
template <class S>
void bias_update(int64_t E, const int64_t* counts, S u, S* bias);

struct LoadMetrics {
  double max_vio, max_over_mean, min_over_mean, cv, gini, entropy;
  int64_t dead;  // experts with zero load
};
LoadMetrics load_metrics(int64_t E, const int64_t* load);

// What MaxVio comes to with balanced random routing of T tokens: E[max of E normals] * sqrt(E/(K*T)).
double max_vio_noise_floor(int64_t E, int64_t K, int64_t T);

}  // namespace v3b::ref
