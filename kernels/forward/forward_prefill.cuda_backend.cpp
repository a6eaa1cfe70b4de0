// What prefill has of its own in the CUDA backend: expanded attention, keys and values made from the latent rows by the
// kv_b product (SPEC 1.7). The rest of the pass is cuda_pass.cpp.
#include "kernels/attention/attention_cuda.h"
#include "kernels/forward/cuda_pass.h"

namespace v3b::kern {
void attention_expanded_cuda(const CudaLayerContext& ctx, const AttentionDims& m,
                             const DeviceLayer& p, const PassItem& item, const int32_t* table,
                             int64_t page, uint8_t* arena, DeviceWorkspace& ws, CudaStream stream) {
  const int64_t s = item.s0 + item.T, row = m.d_c + m.d_r, cols = m.n_h * (m.d_n + m.d_v);
  const uint8_t* rows = ws.lat.as<uint8_t>() + item.first * row * m.e;
  if (item.s0 > 0 || ctx.flags.kv_format != spec::KvFormat::bf16) {
    spec::MlaCacheGatherArgs g{};
    g.s = s, g.d_c = m.d_c, g.d_r = m.d_r, g.page = page;
    g.dtype = ctx.dtype;
    g.kv_format = ctx.flags.kv_format;
    g.block_table = table;
    g.cache = arena;
    g.out = ws.kv_rows.reserve(s * row * m.e);
    mla_cache_gather_cuda_simt(g, stream);
    rows = ws.kv_rows.as<uint8_t>();
  }
  ws.kvb.reserve(s * cols * m.e);
  linear_cuda(ctx.dtype, p.kv_b, s, rows, row, ws.kvb.data(), cols, ctx.dtype, stream);
  spec::MlaPrefillArgs a{};
  a.T = item.T, a.s0 = item.s0, a.n_h = m.n_h, a.d_n = m.d_n, a.d_r = m.d_r, a.d_v = m.d_v;
  a.scale = ctx.softmax_scale;
  a.dtype = ctx.dtype;
  a.q = ws.q.as<uint8_t>() + item.first * m.n_h * m.d_qk * m.e, a.q_stride = m.n_h * m.d_qk;
  a.kv = ws.kvb.data(), a.kv_stride = cols;
  a.k_pe = rows + m.d_c * m.e, a.k_pe_stride = row;
  a.o = ws.attn.as<uint8_t>() + item.first * m.n_h * m.d_v * m.e, a.o_stride = m.n_h * m.d_v;
  if (ctx.dtype == spec::DType::bf16 && m.d_qk <= 256 && m.d_v <= 256)
    mla_prefill_cuda_mma(a, stream);
  else
    mla_prefill_cuda_simt(a, stream);
}

}  // namespace v3b::kern
