// One decoder layer on the device (SPEC 1.6-1.9, 1.12-1.16), in the order of the CPU backend (attention_block.cpp,
// ffn_block.cpp).
#include "kernels/forward/cuda_pass.h"

#include <algorithm>

#include "kernels/attention/attention_cuda.h"
#include "kernels/forward/forward_glue_cuda.h"
#include "kernels/gemm/gemm_cuda.h"
#include "kernels/moe/moe.h"
#include "kernels/moe/moe_cuda.h"
#include "kernels/moe/moe_experts_cuda.h"
#include "kernels/norm_rope/norm_rope_cuda.h"
#include "reference/spec/swiglu.h"

namespace v3b::kern {
namespace {

constexpr double kLatentNormEps = 1e-6;  // q_a and kv_a norms ignore rms_norm_eps (SPEC 1.2)
constexpr int64_t kRows =
    4096;  // rows that go through the linear layers together: bounds the scratch

uint8_t* bytes(void* p) { return static_cast<uint8_t*>(p); }

void norm(const CudaLayerContext& ctx, int64_t T, int64_t d, double eps, const void* x,
          int64_t x_stride, const float* w, void* y, int64_t y_stride, spec::DType y_type,
          CudaStream stream) {
  rmsnorm_mixed_cuda_simt({T, d, eps, ctx.flags.norm_rounding, spec::DType::f32, spec::DType::f32,
                           y_type, x, x_stride, w, y, y_stride},
                          stream);
}

void project(const CudaLayerContext& ctx, const AttentionDims& m, const DeviceLayer& p,
             const DevicePlan& dp, int64_t r0, int64_t n, DeviceWorkspace& ws, CudaStream stream) {
  ws.x.reserve(n * m.d * m.e);
  ws.a.reserve(n * m.a_cols * 4);
  const float* a = ws.a.as<float>();
  norm(ctx, n, m.d, ctx.c.rms_norm_eps, ws.h.as<float>() + r0 * m.d, m.d, p.input_norm, ws.x.data(),
       m.d, ctx.dtype, stream);
  linear_cuda(ctx.dtype, p.a_proj, n, ws.x.data(), m.d, ws.a.data(), m.a_cols, spec::DType::f32,
              stream);
  const int64_t q_cols = m.n_h * m.d_qk;
  uint8_t* q = bytes(ws.q.data()) + r0 * q_cols * m.e;
  if (m.d_q > 0) {
    ws.cq.reserve(n * m.d_q * m.e);
    norm(ctx, n, m.d_q, kLatentNormEps, a, m.a_cols, p.q_a_norm, ws.cq.data(), m.d_q, ctx.dtype,
         stream);
    linear_cuda(ctx.dtype, p.q_b, n, ws.cq.data(), m.d_q, q, q_cols, ctx.dtype, stream);
  } else {
    copy_rows_cuda_simt(n, q_cols, a, spec::DType::f32, m.a_cols, q, ctx.dtype, q_cols, stream);
  }
  const spec::RopeForm form = spec::rope_form(ctx.flags.rope_layout, ctx.c.rope_interleave);
  const int32_t* positions = dp.positions + r0;
  uint8_t* q_pe = q + m.d_n * m.e;
  rope_cuda_simt({n, m.n_h, m.d_r, form, false, ctx.dtype, ctx.dtype, q_pe, q_cols, m.d_qk, q_pe,
                  q_cols, m.d_qk, ctx.cos, ctx.sin, positions},
                 stream);
  const float* kv = a + (m.a_cols - m.d_c - m.d_r);
  const int64_t row = m.d_c + m.d_r;
  uint8_t* lat = bytes(ws.lat.data()) + r0 * row * m.e;
  norm(ctx, n, m.d_c, kLatentNormEps, kv, m.a_cols, p.kv_a_norm, lat, row, ctx.dtype, stream);
  rope_cuda_simt({n, 1, m.d_r, form, false, spec::DType::f32, ctx.dtype, kv + m.d_c, m.a_cols,
                  m.d_r, lat + m.d_c * m.e, row, m.d_r, ctx.cos, ctx.sin, positions},
                 stream);
}

void write_cache(const CudaLayerContext& ctx, const AttentionDims& m, const DevicePlan& dp,
                 uint8_t* arena, DeviceWorkspace& ws, CudaStream stream) {
  spec::MlaCacheWriteArgs a{};
  a.T = dp.rows, a.d_c = m.d_c, a.d_r = m.d_r;
  a.dtype = ctx.dtype;
  a.kv_format = ctx.flags.kv_format;
  a.c = ws.lat.data();
  a.k_pe = bytes(ws.lat.data()) + m.d_c * m.e;
  a.c_stride = a.k_pe_stride = m.d_c + m.d_r;
  a.slots = dp.slots;
  a.cache = arena;
  mla_cache_write_cuda_simt(a, stream);
}

void dense(const CudaLayerContext& ctx, const DeviceLayer& p, int64_t n, float* h,
           DeviceWorkspace& ws, CudaStream stream) {
  const int64_t d = ctx.c.hidden_size, f = p.down.in, e = spec::dtype_bytes(ctx.dtype);
  const float* g = static_cast<const float*>(ws.gate_up.reserve(n * 2 * f * 4));
  ws.hidden.reserve(n * f * e);
  linear_cuda(ctx.dtype, p.gate_up, n, ws.x.data(), d, ws.gate_up.data(), 2 * f, spec::DType::f32,
              stream);
  swiglu_cuda_simt(
      {n, f, spec::DType::f32, ctx.dtype, g, g + f, 2 * f, nullptr, ws.hidden.data(), f}, stream);
  linear_cuda(ctx.dtype, p.down, n, ws.hidden.data(), f, h, d, spec::DType::f32, stream, true);
}

// Router logits [n, E] f32 in ws.logits, in f32 from the unrounded normalised rows, or bf16 throughout
// (router_dtype=bf16, [OFF]).
void router_logits(const CudaLayerContext& ctx, const DeviceLayer& p, int64_t n, const float* h,
                   DeviceWorkspace& ws, CudaStream stream) {
  using enum spec::DType;
  const int64_t d = ctx.c.hidden_size, E = ctx.router.E;
  ws.logits.reserve(n * E * 4);
  if (ctx.flags.router_dtype != spec::RouterDtype::fp32) {
    const void* x = ws.x.data();
    uint8_t* tail = bytes(ws.tail.reserve(n * (d + E) * 2));
    if (ctx.dtype == f32) {
      copy_rows_cuda_simt(n, d, ws.x.data(), f32, d, tail, bf16, d, stream);
      x = tail;
    }
    uint8_t* rounded = tail + n * d * 2;
    linear_cuda(bf16, p.router_bf16, n, x, d, rounded, E, bf16, stream);
    copy_rows_cuda_simt(n, E, rounded, bf16, E, ws.logits.data(), f32, E, stream);
    return;
  }
  const void* x32 = ws.x.data();
  if (ctx.dtype != f32) {
    x32 = ws.x32.reserve(n * d * 4);
    norm(ctx, n, d, ctx.c.rms_norm_eps, h, d, p.post_norm, ws.x32.data(), d, f32, stream);
  }
  GemmArgs g;
  g.M = n, g.N = E, g.K = d;
  g.a = x32, g.b = p.router;
  g.lda = g.ldb = d, g.ldc = E;
  g.c = ws.logits.data();
  g.ab_type = f32;
  gemm_cuda_simt(g, stream);
}

void experts(const CudaLayerContext& ctx, const DeviceLayer& p, int64_t r0, int64_t n, float* h,
             DeviceWorkspace& ws, const RouteTap& routes, CudaStream stream) {
  const model::ModelConfig& c = ctx.c;
  const int64_t d = c.hidden_size, E = c.n_routed_experts, K = c.num_experts_per_tok;
  router_logits(ctx, p, n, h, ws, stream);
  spec::RouterSelectArgs r{};
  r.config = ctx.router;
  r.T = n;
  r.logits = ws.logits.as<float>();
  r.bias = ctx.use_bias ? p.bias : nullptr;
  r.idx = static_cast<int32_t*>(ws.idx.reserve(n * K * 4));
  r.weight = static_cast<float*>(ws.weight.reserve(n * K * 4));
  router_cuda_simt(r, stream);
  const int32_t* served = nullptr;
  if (ctx.capacity_factor > 0) {
    auto* keep = static_cast<int32_t*>(ws.served.reserve(n * K * 4));
    moe_capacity_cuda_simt(
        {n, E, K, r.idx, r.weight, moe_expert_capacity(ctx.capacity_factor, K, n, E),
         ctx.flags.drop_policy, nullptr},
        keep, stream);
    served = keep;
  }
  if (routes) routes(r0, n, r.idx, r.weight, served);

  spec::MoeExpertsArgs a{};
  a.T = n, a.d = d, a.m = c.moe_intermediate_size, a.E = E, a.K = K;
  a.shared_m = p.shared.gate != nullptr ? c.n_shared_experts * c.moe_intermediate_size : 0;
  a.x_dtype = a.w_dtype = ctx.dtype;
  a.x = ws.x.data();
  a.idx = served != nullptr ? served : r.idx;
  a.weight = r.weight;
  a.experts = p.experts;
  a.shared = p.shared;
  a.y = ws.y.reserve(n * d * spec::dtype_bytes(ctx.dtype));
  a.moe_accum = ctx.flags.moe_accum;
  void* scratch = ws.experts.reserve(moe_experts_cuda_scratch_bytes(a));
  if (ctx.dtype == spec::DType::bf16)
    moe_experts_cuda_mma(a, scratch, stream);
  else
    moe_experts_cuda_simt(a, scratch, stream);
  add_rows_cuda_simt(n * d, h, ws.y.data(), ctx.dtype, stream);
}

}  // namespace

void linear_cuda(spec::DType dtype, const DeviceLinear& w, int64_t M, const void* x, int64_t ldx,
                 void* y, int64_t ldy, spec::DType y_type, CudaStream stream, bool accumulate) {
  GemmArgs g;
  g.M = M, g.N = w.out, g.K = w.in;
  g.a = x, g.lda = ldx;
  g.b = w.data, g.ldb = w.in;
  g.c = y, g.ldc = ldy;
  g.ab_type = dtype, g.c_type = y_type;
  g.accumulate = accumulate;
  gemm_cuda_mma(g, stream);
}

void run_attention_cuda(const CudaLayerContext& ctx, const DeviceLayer& p, uint8_t* arena,
                        const Plan& plan, const DevicePlan& dp, DeviceWorkspace& ws,
                        CudaStream stream) {
  const AttentionDims m(ctx.c, ctx.dtype);
  ws.q.reserve(dp.rows * m.n_h * m.d_qk * m.e);
  ws.lat.reserve(dp.rows * (m.d_c + m.d_r) * m.e);
  ws.attn.reserve(dp.rows * m.n_h * m.d_v * m.e);
  for (int64_t r0 = 0; r0 < dp.rows; r0 += kRows)
    project(ctx, m, p, dp, r0, std::min(kRows, dp.rows - r0), ws, stream);
  write_cache(ctx, m, dp, arena, ws, stream);
  for (const AttentionUnit& u : plan.units) {
    if (u.expanded)
      attention_expanded_cuda(ctx, m, p, plan.items[u.item], dp.item_tables[u.item], dp.page, arena,
                              ws, stream);
    else
      attention_absorbed_cuda(ctx, m, p, u, dp, arena, ws, stream);
  }
  for (int64_t r0 = 0; r0 < dp.rows; r0 += kRows) {
    const int64_t n = std::min(kRows, dp.rows - r0), cols = m.n_h * m.d_v;
    linear_cuda(ctx.dtype, p.o_proj, n, bytes(ws.attn.data()) + r0 * cols * m.e, cols,
                ws.h.as<float>() + r0 * m.d, m.d, spec::DType::f32, stream, true);
  }
}

void run_ffn_cuda(const CudaLayerContext& ctx, const DeviceLayer& p, int64_t rows,
                  DeviceWorkspace& ws, const RouteTap& routes, CudaStream stream) {
  const int64_t d = ctx.c.hidden_size;
  // A capacity is of all rows of the pass together.
  const int64_t chunk = ctx.capacity_factor > 0 ? rows : kRows;
  for (int64_t r0 = 0; r0 < rows; r0 += chunk) {
    const int64_t n = std::min(chunk, rows - r0);
    float* h = ws.h.as<float>() + r0 * d;
    ws.x.reserve(n * d * spec::dtype_bytes(ctx.dtype));
    norm(ctx, n, d, ctx.c.rms_norm_eps, h, d, p.post_norm, ws.x.data(), d, ctx.dtype, stream);
    if (p.is_moe)
      experts(ctx, p, r0, n, h, ws, routes, stream);
    else
      dense(ctx, p, n, h, ws, stream);
  }
}

}  // namespace v3b::kern
