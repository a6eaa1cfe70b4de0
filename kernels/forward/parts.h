// The pieces of a pass (pass.h) that belong to one op: attention of long and of few new rows, and
// the entry of the MTP module.
#pragma once
#include "kernels/forward/pass.h"

namespace v3b::kern {

// ws.q [rows, n_h, d_qk] and ws.lat [rows, d_c + d_r] -> ws.attn [rows, n_h, d_v] of the item's rows,
// which are in the cache already.
void attention_expanded(const LayerContext& ctx, const AttentionDims& m, const PackedLayer& p,
                        const PassItem& item, uint8_t* arena, Workspace& ws);
// The same of a unit's rows, by the latent rows in the pages.
void attention_absorbed(const LayerContext& ctx, const AttentionDims& m, const PackedLayer& p,
                        const AttentionUnit& u, const Plan& plan, uint8_t* arena, Workspace& ws);

// Latent rows ws.lat [rows, d_c + d_r], rotated, into the pages of the plan's slots.
void write_cache(const model::ModelConfig& c, const spec::Flags& flags, spec::DType dtype,
                 const Plan& plan, uint8_t* arena, const Workspace& ws);

// out [T, d] f32 = eh_proj [enorm(e) ; hnorm(hidden)] (order: flag mtp_concat): what enters the MTP
// module's layer (SPEC 1.25). e [T, d]: embeddings of the next tokens, rows s0 ..; row 0 is zeroed
// where the flag mtp_zero_pos0 says so.
void mtp_input(const model::ModelConfig& c, const spec::Flags& flags, spec::DType dtype,
               const PackedMtp& m, int64_t T, int64_t s0, float* e, const float* hidden,
               Buffer<uint8_t>& scratch, float* out);

}  // namespace v3b::kern
