// One pass of the CPU backend over the rows of one or several sequences: scratch, plan and the
// layer itself.
#pragma once
#include <vector>

#include "kernels/core/buffer.h"
#include "kernels/forward/packed.h"
#include "kernels/forward/page_pool.h"
#include "kernels/forward/trace.h"
#include "kernels/moe/moe.h"
#include "model/backend.h"
#include "model/rope_table.h"
#include "reference/spec/router.h"

namespace v3b::kern {

// Rows [first, first + T) of the pass belong to one sequence that has s0 rows before them.
struct PassItem {
  PagedTrack* track = nullptr;
  int64_t first = 0, T = 0, s0 = 0;
};

// Rows whose attention runs in one kernel call.
struct AttentionUnit {
  bool expanded = false;  // expanded: one sequence, all its new rows; else absorbed on the pages
  int64_t first = 0, B = 1, s_q = 0;  // rows first .. first + B * s_q
  size_t item = 0;                    // expanded: whose rows
  int64_t table = 0;                  // absorbed: offset of [B, max_blocks] in Plan::tables
  int64_t lens = 0;                   // absorbed: offset of [B] in Plan::seqlens
  int64_t max_blocks = 0;
};
struct Plan {
  std::vector<PassItem> items;
  int64_t rows = 0;
  std::vector<int32_t> positions;  // [rows]
  std::vector<int32_t> slots;      // [rows] block * page + offset
  std::vector<AttentionUnit> units;
  std::vector<int32_t> tables, seqlens;
};
// Reserves pages for the new rows and decides the form of attention for each item.
void make_plan(const model::ModelConfig& c, bool absorbed_prefill, Plan& plan);

// Everything that a layer needs and that outlives it. Buffers grow to the largest pass and stay.
struct Workspace {
  Buffer<float> h, a, x32, logits;
  Buffer<uint8_t> x, cq, q, lat, q_abs, o_lat, attn, kv_rows, kvb, gate_up, hidden, y, tail;
  Buffer<int32_t> idx;
  Buffer<float> weight;
  MoeScratch moe;
};

struct LayerContext {
  const model::ModelConfig& c;
  const spec::Flags& flags;
  spec::DType dtype;  // compute
  spec::RouterConfig router;
  bool use_bias;
  const model::RopeTable& rope;
  double softmax_scale;
  double capacity_factor = 0;  // model::BackendOptions
};

// Sizes of a layer's attention, of either backend. a_cols: columns of the fused q_a | kv_a product.
struct AttentionDims {
  int64_t d, n_h, d_n, d_r, d_v, d_c, d_q, d_qk, a_cols, e;
  AttentionDims(const model::ModelConfig& c, spec::DType dtype)
      : d(c.hidden_size),
        n_h(c.num_attention_heads),
        d_n(c.qk_nope_head_dim),
        d_r(c.qk_rope_head_dim),
        d_v(c.v_head_dim),
        d_c(c.kv_lora_rank),
        d_q(c.q_lora_rank),
        d_qk(d_n + d_r),
        a_cols((d_q > 0 ? d_q : n_h * d_qk) + d_c + d_r),
        e(spec::dtype_bytes(dtype)) {}
};

// h [rows, d] f32 in ws.h: the residual stream, updated in place by one decoder layer. Cache rows
// go to `arena`.
void run_attention(const LayerContext& ctx, const PackedLayer& p, uint8_t* arena, const Plan& plan,
                   Workspace& ws);
// routes: [rows, K] of this layer are appended if not null.
void run_ffn(const LayerContext& ctx, const PackedLayer& p, int64_t rows, Workspace& ws,
             model::LayerRoutes* routes);

// y [M, out] = x [M, in] W^T; x of the compute dtype at stride ldx, y f32 or the compute dtype.
void linear(spec::DType dtype, const Linear& w, int64_t M, const void* x, int64_t ldx, void* y,
            int64_t ldy, spec::DType y_type, bool accumulate = false);

inline constexpr int64_t kRowChunk = 1024;  // rows that go through the linear layers together

}  // namespace v3b::kern
