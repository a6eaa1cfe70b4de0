// What prefill has of its own in the CPU backend: expanded attention, K and V of all keys re-created
// from the latent rows by one product (SPEC 1.6). The rest of the pass is cpu_backend.cpp.
#include "kernels/attention/attention.h"
#include "kernels/forward/parts.h"
#include "reference/spec/attention.h"

namespace v3b::kern {
namespace {

// Cache rows [0, s) of one sequence as [s, d_c + d_r] of the compute dtype.
const uint8_t* gather(const LayerContext& ctx, const AttentionDims& m, const PassItem& item,
                      const uint8_t* arena, Workspace& ws) {
  spec::MlaCacheGatherArgs a{};
  a.s = item.s0 + item.T, a.d_c = m.d_c, a.d_r = m.d_r, a.page = item.track->pool().page();
  a.dtype = ctx.dtype;
  a.kv_format = ctx.flags.kv_format;
  a.block_table = item.track->blocks().data();
  a.cache = arena;
  ws.kv_rows.reserve_discard(a.s * (m.d_c + m.d_r) * m.e);
  a.out = ws.kv_rows.data();
  traced("mla_cache_gather", {{"s", a.s}, {"d_c", a.d_c}, {"d_r", a.d_r}},
         [&] { mla_cache_gather_cpu_simd(a); });
  return ws.kv_rows.data();
}

}  // namespace

void attention_expanded(const LayerContext& ctx, const AttentionDims& m, const PackedLayer& p,
                        const PassItem& item, uint8_t* arena, Workspace& ws) {
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
  traced("mla_prefill",
         {{"T", a.T}, {"s0", a.s0}, {"n_h", a.n_h}, {"d_n", a.d_n}, {"d_r", a.d_r}, {"d_v", a.d_v}},
         [&] { mla_prefill_cpu_simd(a); });
}

}  // namespace v3b::kern
