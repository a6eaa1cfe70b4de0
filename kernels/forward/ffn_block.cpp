// The feed-forward half of a decoder layer (SPEC 1.12-1.16): dense SwiGLU, or router, experts and
// shared expert.
#include <algorithm>
#include <cstring>
#include <vector>

#include "kernels/core/team.h"
#include "kernels/forward/pass.h"
#include "kernels/gemm/gemm.h"
#include "kernels/norm_rope/rmsnorm.h"
#include "kernels/norm_rope/swiglu.h"

namespace v3b::kern {
namespace {

void norm(const LayerContext& ctx, int64_t n, const float* x, const float* w, void* y,
          spec::DType y_type) {
  const int64_t d = ctx.c.hidden_size;
  traced("rmsnorm", {{"T", n}, {"d", d}}, [&] {
    rmsnorm_mixed({n, d, ctx.c.rms_norm_eps, ctx.flags.norm_rounding, spec::DType::f32,
                   spec::DType::f32, y_type, x, d, w, y, d});
  });
}

void dense(const LayerContext& ctx, const PackedLayer& p, int64_t n, float* h, Workspace& ws) {
  const int64_t d = ctx.c.hidden_size, f = p.down.in, e = spec::dtype_bytes(ctx.dtype);
  ws.gate_up.reserve_discard(n * 2 * f * 4);
  ws.hidden.reserve_discard(n * f * e);
  linear(ctx.dtype, p.gate_up, n, ws.x.data(), d, ws.gate_up.data(), 2 * f, spec::DType::f32);
  const float* g = reinterpret_cast<const float*>(ws.gate_up.data());
  traced("swiglu", {{"T", n}, {"m", f}}, [&] {
    swiglu_cpu_simd(
        {n, f, spec::DType::f32, ctx.dtype, g, g + f, 2 * f, nullptr, ws.hidden.data(), f});
  });
  linear(ctx.dtype, p.down, n, ws.hidden.data(), f, h, d, spec::DType::f32, true);
}

// Router logits in f32 from the unrounded normalised rows, or bf16 throughout (router_dtype=bf16,
// [OFF]).
void router_logits(const LayerContext& ctx, const PackedLayer& p, int64_t n, const float* h,
                   Workspace& ws) {
  const int64_t d = ctx.c.hidden_size, E = ctx.router.E;
  ws.logits.reserve_discard(n * E);
  GemmArgs g;
  g.M = n, g.N = E, g.K = d;
  g.lda = g.ldb = d, g.ldc = E;
  g.c = ws.logits.data();
  if (ctx.flags.router_dtype == spec::RouterDtype::fp32) {
    if (ctx.dtype == spec::DType::f32) {
      g.a = ws.x.data();
    } else {
      ws.x32.reserve_discard(n * d);
      norm(ctx, n, h, p.post_norm.data(), ws.x32.data(), spec::DType::f32);
      g.a = ws.x32.data();
    }
    g.b = p.router.data();
    g.ab_type = spec::DType::f32;
    traced("gemm_router", {{"m", n}, {"n", E}, {"k", d}}, [&] { gemm(g); });
    return;
  }
  ws.tail.reserve_discard(n * std::max(d, E) * 2);
  auto* bits = reinterpret_cast<spec::bf16*>(ws.tail.data());
  if (ctx.dtype == spec::DType::f32) {
    convert_f32_to_bf16(reinterpret_cast<const float*>(ws.x.data()), bits, n * d);
    g.a = bits;
  } else {
    g.a = ws.x.data();
  }
  g.b = p.router_bf16.bytes();
  g.ab_type = spec::DType::bf16;
  gemm(g);
  convert_f32_to_bf16(ws.logits.data(), bits, n * E);
  convert_bf16_to_f32(bits, ws.logits.data(), n * E);
}

void add_rows(const LayerContext& ctx, const uint8_t* y, int64_t n, float* h) {
  const int threads = team_for(12.0 * static_cast<double>(n), 0);
  if (ctx.dtype == spec::DType::f32) {
    const float* f = reinterpret_cast<const float*>(y);
#pragma omp parallel for simd schedule(static) num_threads(threads)
    for (int64_t i = 0; i < n; ++i) h[i] += f[i];
    return;
  }
  const uint16_t* b = reinterpret_cast<const uint16_t*>(y);
#pragma omp parallel for simd schedule(static) num_threads(threads)
  for (int64_t i = 0; i < n; ++i) h[i] += std::bit_cast<float>(static_cast<uint32_t>(b[i]) << 16);
}

// Slots beyond an expert's capacity become unused ones (SPEC 1.15).
void drop(const LayerContext& ctx, int64_t n, Workspace& ws, model::LayerRoutes* routes) {
  const int64_t E = ctx.c.n_routed_experts, K = ctx.c.num_experts_per_tok;
  std::vector<uint8_t> keep(static_cast<size_t>(n * K));
  moe_capacity_cpu({n, E, K, ws.idx.data(), ws.weight.data(),
                    moe_expert_capacity(ctx.capacity_factor, K, n, E), ctx.flags.drop_policy,
                    keep.data()});
  for (int64_t i = 0; i < n * K; ++i) {
    const bool dropped = keep[static_cast<size_t>(i)] == 0;
    if (dropped) ws.idx[i] = -1;
    if (routes != nullptr) routes->dropped.push_back(dropped ? 1 : 0);
  }
}

void experts(const LayerContext& ctx, const PackedLayer& p, int64_t n, float* h, Workspace& ws,
             model::LayerRoutes* routes) {
  const model::ModelConfig& c = ctx.c;
  const int64_t d = c.hidden_size, E = c.n_routed_experts, K = c.num_experts_per_tok;
  router_logits(ctx, p, n, h, ws);
  ws.idx.reserve_discard(n * K);
  ws.weight.reserve_discard(n * K);
  spec::RouterSelectArgs r{};
  r.config = ctx.router;
  r.T = n;
  r.logits = ws.logits.data();
  r.bias = ctx.use_bias && p.bias.size() > 0 ? p.bias.data() : nullptr;
  r.idx = ws.idx.data();
  r.weight = ws.weight.data();
  traced("router", {{"T", n}, {"E", E}, {"K", K}}, [&] { router_select_cpu_simd(r); });
  if (routes != nullptr) {
    routes->idx.insert(routes->idx.end(), ws.idx.data(), ws.idx.data() + n * K);
    routes->weight.insert(routes->weight.end(), ws.weight.data(), ws.weight.data() + n * K);
  }
  if (ctx.capacity_factor > 0) drop(ctx, n, ws, routes);
  ws.y.reserve_discard(n * d * spec::dtype_bytes(ctx.dtype));
  spec::MoeExpertsArgs a{};
  const PackedExperts::Shape& shape = p.packed_experts.shape();
  a.T = n, a.d = d, a.m = shape.m, a.E = E, a.K = K;
  a.shared_m = shape.shared_m;
  a.x_dtype = ctx.dtype, a.w_dtype = p.expert_type;
  a.x = ws.x.data();
  a.idx = ws.idx.data();
  a.weight = ws.weight.data();
  a.y = ws.y.data();
  a.moe_accum = ctx.flags.moe_accum;
  traced("moe_experts",
         {{"T", n}, {"d", d}, {"m", a.m}, {"E", E}, {"K", K}, {"shared_m", a.shared_m}},
         [&] { moe_experts_cpu_packed(a, p.packed_experts, ws.moe); });
  traced("add_rows", {{"T", n}, {"d", d}}, {h, n * d * 4},
         [&] { add_rows(ctx, ws.y.data(), n * d, h); });
}

}  // namespace

void run_ffn(const LayerContext& ctx, const PackedLayer& p, int64_t rows, Workspace& ws,
             model::LayerRoutes* routes) {
  const int64_t d = ctx.c.hidden_size;
  // A capacity is of all rows of the pass together.
  const int64_t chunk = ctx.capacity_factor > 0 ? rows : kRowChunk;
  for (int64_t r0 = 0; r0 < rows; r0 += chunk) {
    const int64_t n = std::min(chunk, rows - r0);
    float* h = ws.h.data() + r0 * d;
    ws.x.reserve_discard(n * d * spec::dtype_bytes(ctx.dtype));
    norm(ctx, n, h, p.post_norm.data(), ws.x.data(), ctx.dtype);
    if (p.is_moe) {
      experts(ctx, p, n, h, ws, routes);
    } else {
      dense(ctx, p, n, h, ws);
    }
  }
}

}  // namespace v3b::kern
