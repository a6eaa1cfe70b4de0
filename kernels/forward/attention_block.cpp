// Attention of one decoder layer (SPEC 1.6-1.9): norm, projections, cache write, expanded or
// absorbed core, output projection added to the residual stream.
#include <algorithm>
#include <cstring>

#include "kernels/attention/attention.h"
#include "kernels/forward/pass.h"
#include "kernels/gemm/gemm.h"
#include "kernels/norm_rope/rmsnorm.h"
#include "kernels/norm_rope/rope.h"
#include "reference/spec/attention.h"

namespace v3b::kern {
namespace {

constexpr double kLatentNormEps = 1e-6;  // q_a and kv_a norms ignore rms_norm_eps (SPEC 1.2)

struct Dims {
  int64_t d, n_h, d_n, d_r, d_v, d_c, d_q, d_qk, a_cols, e;
  explicit Dims(const LayerContext& ctx)
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

void norm(const LayerContext& ctx, int64_t T, int64_t d, double eps, const void* x,
          int64_t x_stride, const float* w, void* y, int64_t y_stride, spec::DType y_type) {
  rmsnorm_mixed({T, d, eps, ctx.flags.norm_rounding, spec::DType::f32, spec::DType::f32, y_type, x,
                 x_stride, w, y, y_stride});
}

// q [rows, n_h, d_qk] rotated and latent rows [rows, d_c + d_r] of rows [r0, r0 + n).
void project(const LayerContext& ctx, const Dims& m, const PackedLayer& p, const Plan& plan,
             int64_t r0, int64_t n, Workspace& ws) {
  ws.x.reserve_discard(n * m.d * m.e);
  ws.a.reserve_discard(n * m.a_cols);
  norm(ctx, n, m.d, ctx.c.rms_norm_eps, ws.h.data() + r0 * m.d, m.d, p.input_norm.data(),
       ws.x.data(), m.d, ctx.dtype);
  linear(ctx.dtype, p.a_proj, n, ws.x.data(), m.d, ws.a.data(), m.a_cols, spec::DType::f32);
  uint8_t* q = ws.q.data() + r0 * m.n_h * m.d_qk * m.e;
  const int64_t q_cols = m.n_h * m.d_qk;
  if (m.d_q > 0) {
    ws.cq.reserve_discard(n * m.d_q * m.e);
    norm(ctx, n, m.d_q, kLatentNormEps, ws.a.data(), m.a_cols, p.q_a_norm.data(), ws.cq.data(),
         m.d_q, ctx.dtype);
    linear(ctx.dtype, p.q_b, n, ws.cq.data(), m.d_q, q, q_cols, ctx.dtype);
  } else {
    for (int64_t t = 0; t < n; ++t) {
      const float* src = ws.a.data() + t * m.a_cols;
      if (ctx.dtype == spec::DType::f32) {
        std::memcpy(q + t * q_cols * m.e, src, static_cast<size_t>(q_cols * m.e));
      } else {
        convert_f32_to_bf16(src, reinterpret_cast<spec::bf16*>(q) + t * q_cols, q_cols);
      }
    }
  }
  const spec::RopeForm form = spec::rope_form(ctx.flags.rope_layout, ctx.c.rope_interleave);
  const int32_t* positions = plan.positions.data() + r0;
  spec::RopeArgs rq{n,
                    m.n_h,
                    m.d_r,
                    form,
                    false,
                    ctx.dtype,
                    ctx.dtype,
                    q + m.d_n * m.e,
                    q_cols,
                    m.d_qk,
                    q + m.d_n * m.e,
                    q_cols,
                    m.d_qk,
                    ctx.rope.cos.data(),
                    ctx.rope.sin.data(),
                    positions};
  rope_cpu_simd(rq);
  const float* kv = ws.a.data() + (m.a_cols - m.d_c - m.d_r);
  const int64_t row = m.d_c + m.d_r;
  uint8_t* lat = ws.lat.data() + r0 * row * m.e;
  norm(ctx, n, m.d_c, kLatentNormEps, kv, m.a_cols, p.kv_a_norm.data(), lat, row, ctx.dtype);
  spec::RopeArgs rk{n,
                    1,
                    m.d_r,
                    form,
                    false,
                    spec::DType::f32,
                    ctx.dtype,
                    kv + m.d_c,
                    m.a_cols,
                    m.d_r,
                    lat + m.d_c * m.e,
                    row,
                    m.d_r,
                    ctx.rope.cos.data(),
                    ctx.rope.sin.data(),
                    positions};
  rope_cpu_simd(rk);
}

void write_cache(const LayerContext& ctx, const Dims& m, const Plan& plan, uint8_t* arena,
                 const Workspace& ws) {
  const int64_t row = m.d_c + m.d_r;
  spec::MlaCacheWriteArgs a{};
  a.T = plan.rows, a.d_c = m.d_c, a.d_r = m.d_r;
  a.dtype = ctx.dtype;
  a.kv_format = ctx.flags.kv_format;
  a.c = ws.lat.data();
  a.k_pe = ws.lat.data() + m.d_c * m.e;
  a.c_stride = a.k_pe_stride = row;
  a.slots = plan.slots.data();
  a.cache = arena;
  mla_cache_write_cpu_simd(a);
}

// Cache rows [0, s) of one sequence as [s, d_c + d_r] of the compute dtype.
const uint8_t* gather(const LayerContext& ctx, const Dims& m, const PassItem& item,
                      const uint8_t* arena, Workspace& ws) {
  spec::MlaCacheGatherArgs a{};
  a.s = item.s0 + item.T, a.d_c = m.d_c, a.d_r = m.d_r, a.page = item.track->pool().page();
  a.dtype = ctx.dtype;
  a.kv_format = ctx.flags.kv_format;
  a.block_table = item.track->blocks().data();
  a.cache = arena;
  ws.kv_rows.reserve_discard(a.s * (m.d_c + m.d_r) * m.e);
  a.out = ws.kv_rows.data();
  mla_cache_gather_cpu_simd(a);
  return ws.kv_rows.data();
}

void expanded(const LayerContext& ctx, const Dims& m, const PackedLayer& p, const PassItem& item,
              uint8_t* arena, Workspace& ws) {
  const int64_t s = item.s0 + item.T, row = m.d_c + m.d_r, cols = m.n_h * (m.d_n + m.d_v), e = m.e;
  const bool fresh = item.s0 == 0 && ctx.flags.kv_format == spec::KvFormat::bf16;
  const uint8_t* rows =
      fresh ? ws.lat.data() + item.first * row * e : gather(ctx, m, item, arena, ws);
  ws.kvb.reserve_discard(s * cols * e);
  linear(ctx.dtype, p.kv_b, s, rows, row, ws.kvb.data(), cols, ctx.dtype);
  spec::MlaPrefillArgs a{};
  a.T = item.T, a.s0 = item.s0, a.n_h = m.n_h, a.d_n = m.d_n, a.d_r = m.d_r, a.d_v = m.d_v;
  a.scale = ctx.softmax_scale;
  a.dtype = ctx.dtype;
  a.q = ws.q.data() + item.first * m.n_h * m.d_qk * e, a.q_stride = m.n_h * m.d_qk;
  a.kv = ws.kvb.data(), a.kv_stride = cols;
  a.k_pe = rows + m.d_c * e, a.k_pe_stride = row;
  a.o = ws.attn.data() + item.first * m.n_h * m.d_v * e, a.o_stride = m.n_h * m.d_v;
  mla_prefill_cpu_simd(a);
}

void absorbed(const LayerContext& ctx, const Dims& m, const PackedLayer& p, const AttentionUnit& u,
              const Plan& plan, uint8_t* arena, Workspace& ws) {
  const int64_t n = u.B * u.s_q, row = m.d_c + m.d_r, e = m.e;
  ws.q_abs.reserve_discard(n * m.n_h * row * e);
  ws.o_lat.reserve_discard(n * m.n_h * m.d_c * e);
  const uint8_t* q = ws.q.data() + u.first * m.n_h * m.d_qk * e;
  GemmArgs g;
  g.M = n, g.N = m.d_c, g.K = m.d_n;
  g.a = q, g.lda = m.n_h * m.d_qk;
  g.b = p.uk_t.data.data(), g.ldb = m.d_n;
  g.c = ws.q_abs.data(), g.ldc = m.n_h * row;
  g.ab_type = g.c_type = ctx.dtype;
  gemm_batched(g, m.n_h, m.d_qk, m.d_c * m.d_n, row);
  for (int64_t r = 0; r < n * m.n_h; ++r)
    std::memcpy(ws.q_abs.data() + (r * row + m.d_c) * e, q + (r * m.d_qk + m.d_n) * e,
                static_cast<size_t>(m.d_r * e));

  spec::MlaDecodeArgs a{};
  a.B = u.B, a.s_q = u.s_q, a.n_h = m.n_h, a.d_c = m.d_c, a.d_r = m.d_r;
  a.page = plan.items[0].track->pool().page(), a.max_blocks = u.max_blocks;
  a.scale = ctx.softmax_scale;
  a.dtype = ctx.dtype;
  a.kv_format = ctx.flags.kv_format;
  a.empty_lse = ctx.flags.empty_lse;
  a.q = ws.q_abs.data();
  a.cache = arena;
  a.block_table = plan.tables.data() + u.table;
  a.cache_seqlens = plan.seqlens.data() + u.lens;
  a.out = ws.o_lat.data();
  mla_decode_cpu_simd(a);

  const int64_t both = m.d_n + m.d_v;
  GemmArgs w;
  w.M = n, w.N = m.d_v, w.K = m.d_c;
  w.a = ws.o_lat.data(), w.lda = m.n_h * m.d_c;
  w.b = p.kv_b.data.data() + m.d_n * m.d_c * e, w.ldb = m.d_c;
  w.c = ws.attn.data() + u.first * m.n_h * m.d_v * e, w.ldc = m.n_h * m.d_v;
  w.ab_type = w.c_type = ctx.dtype;
  gemm_batched(w, m.n_h, m.d_c, both * m.d_c, m.d_v);
}

}  // namespace

void linear(spec::DType dtype, const Linear& w, int64_t M, const void* x, int64_t ldx, void* y,
            int64_t ldy, spec::DType y_type, bool accumulate) {
  GemmArgs g;
  g.M = M, g.N = w.out, g.K = w.in;
  g.a = x, g.lda = ldx;
  g.b = w.data.data(), g.ldb = w.in;
  g.c = y, g.ldc = ldy;
  g.ab_type = dtype, g.c_type = y_type;
  g.accumulate = accumulate;
  gemm(g);
}

void run_attention(const LayerContext& ctx, const PackedLayer& p, uint8_t* arena, const Plan& plan,
                   Workspace& ws) {
  const Dims m(ctx);
  ws.q.reserve_discard(plan.rows * m.n_h * m.d_qk * m.e);
  ws.lat.reserve_discard(plan.rows * (m.d_c + m.d_r) * m.e);
  ws.attn.reserve_discard(plan.rows * m.n_h * m.d_v * m.e);
  for (int64_t r0 = 0; r0 < plan.rows; r0 += kRowChunk)
    project(ctx, m, p, plan, r0, std::min(kRowChunk, plan.rows - r0), ws);
  write_cache(ctx, m, plan, arena, ws);
  for (const AttentionUnit& u : plan.units) {
    if (u.expanded) {
      expanded(ctx, m, p, plan.items[u.item], arena, ws);
    } else {
      absorbed(ctx, m, p, u, plan, arena, ws);
    }
  }
  for (int64_t r0 = 0; r0 < plan.rows; r0 += kRowChunk) {
    const int64_t n = std::min(kRowChunk, plan.rows - r0), cols = m.n_h * m.d_v;
    linear(ctx.dtype, p.o_proj, n, ws.attn.data() + r0 * cols * m.e, cols, ws.h.data() + r0 * m.d,
           m.d, spec::DType::f32, true);
  }
}

}  // namespace v3b::kern
