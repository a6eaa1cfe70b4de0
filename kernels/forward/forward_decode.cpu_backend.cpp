// What decode has of its own in the CPU backend: absorbed attention, W_UK folded into the queries and
// W_UV applied to what comes back, so that every key is one latent row (SPEC 1.8). The rest of the
// pass is cpu_backend.cpp.
#include <cstring>

#include "kernels/attention/attention.h"
#include "kernels/forward/parts.h"
#include "kernels/gemm/gemm.h"
#include "reference/spec/attention.h"

namespace v3b::kern {

void attention_absorbed(const LayerContext& ctx, const AttentionDims& m, const PackedLayer& p,
                        const AttentionUnit& u, const Plan& plan, uint8_t* arena, Workspace& ws) {
  const int64_t n = u.B * u.s_q, row = m.d_c + m.d_r, e = m.e;
  ws.q_abs.reserve_discard(n * m.n_h * row * e);
  ws.o_lat.reserve_discard(n * m.n_h * m.d_c * e);
  const uint8_t* q = ws.q.data() + u.first * m.n_h * m.d_qk * e;
  GemmArgs g;
  g.M = n, g.N = m.d_c, g.K = m.d_n;
  g.a = q, g.lda = m.n_h * m.d_qk;
  g.b = p.uk_t.bytes(), g.ldb = m.d_n;
  g.c = ws.q_abs.data(), g.ldc = m.n_h * row;
  g.ab_type = g.c_type = ctx.dtype;
  traced("gemm_batched", {{"heads", m.n_h}, {"m", n}, {"n", m.d_c}, {"k", m.d_n}},
         [&] { gemm_batched(g, m.n_h, m.d_qk, m.d_c * m.d_n, row); });
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
  traced("mla_decode",
         {{"B", a.B},
          {"s_q", a.s_q},
          {"s", plan.seqlens[static_cast<size_t>(u.lens)]},
          {"n_h", m.n_h},
          {"d_c", m.d_c},
          {"d_r", m.d_r}},
         [&] { mla_decode_cpu_simd(a); });

  const int64_t both = m.d_n + m.d_v;
  GemmArgs w;
  w.M = n, w.N = m.d_v, w.K = m.d_c;
  w.a = ws.o_lat.data(), w.lda = m.n_h * m.d_c;
  w.b = p.kv_b.bytes() + m.d_n * m.d_c * e, w.ldb = m.d_c;
  w.c = ws.attn.data() + u.first * m.n_h * m.d_v * e, w.ldc = m.n_h * m.d_v;
  w.ab_type = w.c_type = ctx.dtype;
  traced("gemm_batched", {{"heads", m.n_h}, {"m", n}, {"n", m.d_v}, {"k", m.d_c}},
         [&] { gemm_batched(w, m.n_h, m.d_c, both * m.d_c, m.d_v); });
}

}  // namespace v3b::kern
