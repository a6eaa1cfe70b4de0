// Attention of one decoder layer (SPEC 1.6-1.9): norm, projections, cache write, expanded core
// (forward_prefill.cpu_backend.cpp) or absorbed (forward_decode.cpu_backend.cpp), output projection
// added to the residual stream.
#include <algorithm>
#include <cstring>

#include "kernels/attention/attention.h"
#include "kernels/forward/parts.h"
#include "kernels/gemm/gemm.h"
#include "kernels/norm_rope/rmsnorm.h"
#include "kernels/norm_rope/rope.h"
#include "reference/spec/attention.h"

namespace v3b::kern {
namespace {

constexpr double kLatentNormEps = 1e-6;  // q_a and kv_a norms ignore rms_norm_eps (SPEC 1.2)

void norm(const LayerContext& ctx, int64_t T, int64_t d, double eps, const void* x,
          int64_t x_stride, const float* w, void* y, int64_t y_stride, spec::DType y_type) {
  traced("rmsnorm", {{"T", T}, {"d", d}}, [&] {
    rmsnorm_mixed({T, d, eps, ctx.flags.norm_rounding, spec::DType::f32, spec::DType::f32, y_type,
                   x, x_stride, w, y, y_stride});
  });
}

// q [rows, n_h, d_qk] rotated and latent rows [rows, d_c + d_r] of rows [r0, r0 + n).
void project(const LayerContext& ctx, const AttentionDims& m, const PackedLayer& p,
             const Plan& plan, int64_t r0, int64_t n, Workspace& ws) {
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
  // In place: a repetition finds what the first one found.
  traced("rope", {{"T", n}, {"n_h", m.n_h}, {"d_r", m.d_r}}, {q, n * q_cols * m.e},
         [&] { rope_cpu_simd(rq); });
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
  traced("rope", {{"T", n}, {"n_h", 1}, {"d_r", m.d_r}}, [&] { rope_cpu_simd(rk); });
}

}  // namespace

void write_cache(const model::ModelConfig& c, const spec::Flags& flags, spec::DType dtype,
                 const Plan& plan, uint8_t* arena, const Workspace& ws) {
  const int64_t row = c.kv_lora_rank + c.qk_rope_head_dim;
  spec::MlaCacheWriteArgs a{};
  a.T = plan.rows, a.d_c = c.kv_lora_rank, a.d_r = c.qk_rope_head_dim;
  a.dtype = dtype;
  a.kv_format = flags.kv_format;
  a.c = ws.lat.data();
  a.k_pe = ws.lat.data() + a.d_c * spec::dtype_bytes(dtype);
  a.c_stride = a.k_pe_stride = row;
  a.slots = plan.slots.data();
  a.cache = arena;
  traced("mla_cache_write", {{"T", a.T}, {"d_c", a.d_c}, {"d_r", a.d_r}},
         [&] { mla_cache_write_cpu_simd(a); });
}

void linear(spec::DType dtype, const Linear& w, int64_t M, const void* x, int64_t ldx, void* y,
            int64_t ldy, spec::DType y_type, bool accumulate) {
  const int64_t c_bytes = accumulate ? ((M - 1) * ldy + w.out) * spec::dtype_bytes(y_type) : 0;
  traced("gemm", {{"m", M}, {"n", w.out}, {"k", w.in}, {"accumulate", accumulate ? 1 : 0}},
         {y, c_bytes}, [&] {
           packed_linear(w.packed.view(), {dtype, x, ldx, nullptr, M, w.in},
                         {y, ldy, y_type, accumulate});
         });
}

void run_attention(const LayerContext& ctx, const PackedLayer& p, uint8_t* arena, const Plan& plan,
                   Workspace& ws) {
  const AttentionDims m(ctx.c, ctx.dtype);
  ws.q.reserve_discard(plan.rows * m.n_h * m.d_qk * m.e);
  ws.lat.reserve_discard(plan.rows * (m.d_c + m.d_r) * m.e);
  ws.attn.reserve_discard(plan.rows * m.n_h * m.d_v * m.e);
  for (int64_t r0 = 0; r0 < plan.rows; r0 += kRowChunk)
    project(ctx, m, p, plan, r0, std::min(kRowChunk, plan.rows - r0), ws);
  write_cache(ctx.c, ctx.flags, ctx.dtype, plan, arena, ws);
  for (const AttentionUnit& u : plan.units) {
    if (u.expanded) {
      attention_expanded(ctx, m, p, plan.items[u.item], arena, ws);
    } else {
      attention_absorbed(ctx, m, p, u, plan, arena, ws);
    }
  }
  for (int64_t r0 = 0; r0 < plan.rows; r0 += kRowChunk) {
    const int64_t n = std::min(kRowChunk, plan.rows - r0), cols = m.n_h * m.d_v;
    linear(ctx.dtype, p.o_proj, n, ws.attn.data() + r0 * cols * m.e, cols, ws.h.data() + r0 * m.d,
           m.d, spec::DType::f32, true);
  }
}

}  // namespace v3b::kern
