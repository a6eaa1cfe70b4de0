// What decode has of its own in the CPU backend: absorbed attention, W_UK folded into the queries and
// W_UV applied to what comes back, so that every key is one latent row (SPEC 1.8). The rest of the
// pass is cpu_backend.cpp.
#include <cstring>

#include "kernels/attention/attention.h"
#include "kernels/forward/parts.h"
#include "reference/spec/attention.h"

namespace v3b::kern {

void attention_absorbed(const LayerContext& ctx, const AttentionDims& m, const PackedLayer& p,
                        const AttentionUnit& u, const Plan& plan, uint8_t* arena, Workspace& ws) {
  const int64_t n = u.B * u.s_q, row = m.d_c + m.d_r, e = m.e;
  ws.q_abs.reserve_discard(n * m.n_h * row * e);
  ws.o_lat.reserve_discard(n * m.n_h * m.d_c * e);
  const uint8_t* q = ws.q.data() + u.first * m.n_h * m.d_qk * e;
  traced("mla_absorb", {{"heads", m.n_h}, {"m", n}, {"n", m.d_c}, {"k", m.d_n}}, [&] {
    packed_heads({n, q, m.n_h * m.d_qk, m.d_qk, ws.q_abs.data(), m.n_h * row, row}, p.w_uk);
  });
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

  traced("mla_absorb", {{"heads", m.n_h}, {"m", n}, {"n", m.d_v}, {"k", m.d_c}}, [&] {
    packed_heads({n, ws.o_lat.data(), m.n_h * m.d_c, m.d_c,
                  ws.attn.data() + u.first * m.n_h * m.d_v * e, m.n_h * m.d_v, m.d_v},
                 p.w_uv);
  });
}

}  // namespace v3b::kern
