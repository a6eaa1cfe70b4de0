// Attention cores: MHA/MQA/GQA (SPEC 1.5), MLA expanded (1.7), MLA absorbed on the paged latent cache (1.8, 1.9).
#pragma once
#include "reference/spec/dtype.h"
#include "reference/spec/flags.h"
#include "reference/spec/glossary.h"

namespace v3b::spec {

// Causal core with equal treatment of MHA (n_kv = n_h), MQA (1), GQA, and expanded MLA (d_qk 192, d_v 128).
// T new tokens after s0 cached ones: key j is visible to query i iff j <= s0 + i. s = s0 + T.
struct AttentionArgs {
  int64_t T, s0, n_h, n_kv, d_qk, d_v;
  double scale;
  DType dtype;           // of q, k, v, o
  const void* q;         // [T, n_h, d_qk]
  const void* k;         // [s, n_kv, d_qk], row stride k_stride elements
  const void* v;         // [s, n_kv, d_v], row stride v_stride elements
  int64_t q_stride, k_stride, v_stride, o_stride;  // elements between tokens
  void* o;               // [T, n_h, d_v]
  float* lse;            // [T, n_h] natural log, or null
};

// Latent cache pages, FlashMLA layout: [num_blocks, page, d_c + d_r] bf16 or f32, or 656-byte records (kv_format).
// Unused block ids may be garbage, unused rows NaN: neither may be read.
struct MlaDecodeArgs {
  int64_t B, s_q, n_h, d_c, d_r, page, max_blocks;
  double scale;          // of d_qk before absorption, with mscale^2 (SPEC 1.8), not 576^(-1/2)
  DType dtype;           // of q, out and of a bf16/f32 cache
  KvFormat kv_format;
  EmptyLse empty_lse;
  const void* q;         // [B, s_q, n_h, d_c + d_r]: absorbed q~ then rotated q_pe
  const void* cache;     // pages as above
  const int32_t* block_table;   // [B, max_blocks]
  const int32_t* cache_seqlens; // [B], includes the s_q new rows; query i sees rows < seqlen - s_q + i + 1
  void* out;             // [B, s_q, n_h, d_c]
  float* lse;            // [B, n_h, s_q] natural log, or null
};

// Bytes of one cache row. fp8: d_c codes, d_c/128 (rounded up) fp32 scales, d_r bf16 (SPEC 1.9).
V3B_HD constexpr int64_t mla_cache_row_bytes(KvFormat f, DType dtype, int64_t d_c, int64_t d_r) {
  return f == KvFormat::bf16 ? (d_c + d_r) * dtype_bytes(dtype) : d_c + 4 * ((d_c + 127) / 128) + 2 * d_r;
}

}  // namespace v3b::spec
