// The pieces of a pass (pass.h) that belong to one op: attention of long and of few new rows, and
// the entry of the MTP module.
#pragma once
#include "kernels/forward/pass.h"

namespace v3b::kern {

struct AttentionDims {
  int64_t d, n_h, d_n, d_r, d_v, d_c, d_q, d_qk, a_cols, e;
  explicit AttentionDims(const LayerContext& ctx)
      : d(ctx.c.hidden_size),
        n_h(ctx.c.num_attention_heads),
        d_n(ctx.c.qk_nope_head_dim),
        d_r(ctx.c.qk_rope_head_dim),
        d_v(ctx.c.v_head_dim),
        d_c(ctx.c.kv_lora_rank),
        d_q(ctx.c.q_lora_rank),
        d_qk(d_n + d_r),
        a_cols((d_q > 0 ? d_q : n_h * d_qk) + d_c + d_r),
        e(spec::dtype_bytes(ctx.dtype)) {}
};

// ws.q [rows, n_h, d_qk] and ws.lat [rows, d_c + d_r] -> ws.attn [rows, n_h, d_v] of the item's rows,
// which are in the cache already.
void attention_expanded(const LayerContext& ctx, const AttentionDims& m, const PackedLayer& p,
                        const PassItem& item, uint8_t* arena, Workspace& ws);
// The same of a unit's rows, by the latent rows in the pages.
void attention_absorbed(const LayerContext& ctx, const AttentionDims& m, const PackedLayer& p,
                        const AttentionUnit& u, const Plan& plan, uint8_t* arena, Workspace& ws);

// out [T, d] f32 = eh_proj [enorm(e) ; hnorm(hidden)] (order: flag mtp_concat): what enters the MTP
// module's layer (SPEC 1.25). e [T, d]: embeddings of the next tokens, rows s0 ..; row 0 is zeroed
// where the flag mtp_zero_pos0 says so.
void mtp_input(const model::ModelConfig& c, const spec::Flags& flags, spec::DType dtype,
               const PackedMtp& m, int64_t T, int64_t s0, float* e, const float* hidden,
               Buffer<uint8_t>& scratch, float* out);

}  // namespace v3b::kern
