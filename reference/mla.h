// Multi-head latent attention around the attention core (SPEC 1.6-1.8): expansion of latents to
// keys and values, its backward (3.3), absorption of W_UK into q, the absorbed core, un-absorption
// by W_UV. float and double.
#pragma once
#include <cstdint>

#include "reference/attention.h"

namespace v3b::ref {

// w_kvb [n_h (d_n + d_v), d_c]: head h owns d_n rows of W_UK^h, then d_v rows of W_UV^h.
struct MlaShape {
  int64_t n_h = 1, d_n = 0, d_r = 0, d_v = 0, d_c = 0;
  int64_t d_qk() const { return d_n + d_r; }
};

// The attention scale: d_qk^(-1/2) mscale^2, of the head dimension BEFORE absorption. YaRN's mscale
// (SPEC 1.4) is 1 without it.
double mla_scale(int64_t d_qk, double mscale = 1.0);

// c [s, d_c] (normalised), k_pe [s, d_r] (rotated) -> k [s, n_h, d_n + d_r] = [W_UK c ; k_pe], v
// [s, n_h, d_v].
template <class S>
void mla_expand(const MlaShape& m, int64_t s, const S* c, const S* k_pe, const S* w_kvb, S* k,
                S* v);
// dk, dv as k, v -> dc, dk_pe overwritten (dk_pe sums over heads), dw_kvb accumulated.
template <class S>
void mla_expand_backward(const MlaShape& m, int64_t s, const S* c, const S* w_kvb, const S* dk,
                         const S* dv, S* dc, S* dk_pe, S* dw_kvb);

// q [T, n_h, d_n + d_r] (q_pe rotated) -> q_abs [T, n_h, d_c + d_r] = [q_nope W_UK ; q_pe].
template <class S>
void mla_absorb_q(const MlaShape& m, int64_t T, const S* q, const S* w_kvb, S* q_abs);
// The absorbed core: MQA with keys kv [s, d_c + d_r] and values = the first d_c of each key. Query
// i sees j <= s0 + i. o_lat [T, n_h, d_c], lse [T, n_h] or null.
template <class S>
void mla_latent_core(int64_t T, int64_t s0, int64_t n_h, int64_t d_c, int64_t d_r, double scale,
                     const S* q_abs, const S* kv, S* o_lat, S* lse = nullptr,
                     spec::EmptyLse empty_lse = spec::EmptyLse::pos_inf);
// o_lat [T, n_h, d_c] -> o [T, n_h, d_v] = W_UV o_lat.
template <class S>
void mla_unabsorb(const MlaShape& m, int64_t T, const S* o_lat, const S* w_kvb, S* o);

// The absorbed core on a paged cache of S elements [num_blocks, page, d_c + d_r] for B sequences.
// block_table [B, max_blocks]; cache_seqlens [B] include the s_q newest rows, query i sees rows <
// seqlen - s_q + i + 1. Only blocks and rows below the length are read: other ids may be garbage,
// other rows NaN.
struct MlaPagedShape {
  int64_t B = 1, s_q = 1, n_h = 1, d_c = 0, d_r = 0, page = 64, max_blocks = 0;
  double scale = 1;
  spec::EmptyLse empty_lse = spec::EmptyLse::pos_inf;
};
// q_abs [B, s_q, n_h, d_c + d_r] -> o_lat [B, s_q, n_h, d_c], lse [B, n_h, s_q] or null.
template <class S>
void mla_decode_paged(const MlaPagedShape& m, const S* q_abs, const S* cache,
                      const int32_t* block_table, const int32_t* cache_seqlens, S* o_lat,
                      S* lse = nullptr);

}  // namespace v3b::ref
