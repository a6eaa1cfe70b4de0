// The models that the ops forward_prefill, forward_decode and mtp_module run on, and the made-up contexts of long ones.
#pragma once
#include <cstdint>

#include "model/backend.h"
#include "model/weights.h"
#include "reference/spec/forward.h"

namespace v3b::bench {

// The configuration of a case. mtp: with an MTP module. weights=tiny_v3: the shipped model's own; throws Error(usage)
// where the shape is another one.
model::ModelConfig forward_config(const spec::ForwardShape& s, bool mtp = true);
// Matrices of the whole model, in elements.
double forward_weight_count(const spec::ForwardShape& s, bool mtp);

// weights=tiny_v3: the shipped checkpoint. Else random, steered: a token's class decides its experts. A class vector
// dominates its embedding, and each router answers it with K experts of M groups at scores near 1, all others near 0.
// A bf16 pass then takes the very routes of the reference, every row can be judged, and loads are even. Made on all
// cores; the model is kept as long as somebody uses it. Throws TooLarge where it does not fit into the free memory.
model::WeightsPtr forward_weights(const spec::ForwardShape& s, bool mtp);

// context=rows: what sequence b finds cached. N(0,1) values of bf16, one row in 16 twice as loud, so that the softmax
// is far from flat and rows of any page show in the result.
model::CacheRows forward_rows(const spec::ForwardShape& s, uint64_t seed, int64_t b);

}  // namespace v3b::bench
