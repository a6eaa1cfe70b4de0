// Attention cores: MHA/MQA/GQA (SPEC 1.5), MLA expanded (1.7), MLA absorbed on the paged latent
// cache (1.8, 1.9).
#pragma once
#include "reference/spec/dtype.h"
#include "reference/spec/flags.h"
#include "reference/spec/glossary.h"

namespace v3b::spec {

// Causal core with equal treatment of MHA (n_kv = n_h), MQA (1), GQA, and expanded MLA (d_qk 192,
// d_v 128). T new tokens after s0 cached ones: key j is visible to query i iff j <= s0 + i. s = s0
// + T.
struct AttentionArgs {
  int64_t T, s0, n_h, n_kv, d_qk, d_v;
  double scale;
  DType dtype;                                     // of q, k, v, o
  const void* q;                                   // [T, n_h, d_qk]
  const void* k;                                   // [s, n_kv, d_qk], row stride k_stride elements
  const void* v;                                   // [s, n_kv, d_v], row stride v_stride elements
  int64_t q_stride, k_stride, v_stride, o_stride;  // elements between tokens
  void* o;                                         // [T, n_h, d_v]
  float* lse;                                      // [T, n_h] natural log, or null
  EmptyLse empty_lse;  // what lse is where s0 < 0 leaves a query without keys
};

// Expanded MLA core from what the kv_b product leaves (SPEC 1.7), without building k: key of head h
// = [kv's first d_n of the head ; k_pe], value = kv's last d_v. Visibility as above, s = s0 + T.
struct MlaPrefillArgs {
  int64_t T, s0, n_h, d_n, d_r, d_v;
  double scale;                                        // d_qk^(-1/2) mscale^2
  DType dtype;                                         // of q, kv, k_pe, o
  const void* q;                                       // [T, n_h, d_n + d_r], q_pe rotated
  const void* kv;                                      // [s, n_h, d_n + d_v] = c W_kvb^T
  const void* k_pe;                                    // [s, d_r] rotated
  int64_t q_stride, kv_stride, k_pe_stride, o_stride;  // elements between tokens
  void* o;                                             // [T, n_h, d_v]
  float* lse;                                          // [T, n_h] natural log, or null
};

// One new query a sequence against a contiguous cache (MHA, GQA, MQA). Rows at and past the length
// may be NaN.
struct AttentionDecodeArgs {
  int64_t B, n_h, n_kv, d_qk, d_v;
  double scale;
  DType dtype;  // of q, k, v, o
  EmptyLse empty_lse;
  const void* q;  // [B, n_h, d_qk] dense
  const void* k;  // sequence b, head g, row j at b * k_batch + g * k_head + j * k_row elements
  const void* v;
  int64_t k_batch, k_head, k_row, v_batch, v_head, v_row;
  const int32_t* cache_seqlens;  // [B], the new row included; 0 is legal
  void* o;                       // [B, n_h, d_v] dense
  float* lse;                    // [B, n_h] natural log, or null
};

// Latent cache pages, FlashMLA layout: [num_blocks, page, d_c + d_r] bf16 or f32, or 656-byte
// records (kv_format). Unused block ids may be garbage, unused rows NaN: neither may be read.
struct MlaDecodeArgs {
  int64_t B, s_q, n_h, d_c, d_r, page, max_blocks;
  double scale;  // of d_qk before absorption, with mscale^2 (SPEC 1.8), not 576^(-1/2)
  DType dtype;   // of q, out and of a bf16/f32 cache
  KvFormat kv_format;
  EmptyLse empty_lse;
  const void* q;               // [B, s_q, n_h, d_c + d_r]: absorbed q~ then rotated q_pe
  const void* cache;           // pages as above
  const int32_t* block_table;  // [B, max_blocks]
  const int32_t*
      cache_seqlens;  // [B], includes the s_q new rows; query i sees rows < seqlen - s_q + i + 1
  void* out;          // [B, s_q, n_h, d_c]
  float* lse;         // [B, n_h, s_q] natural log, or null
};

// Writes T rows into a latent cache: c after the norm, k_pe after RoPE (SPEC 1.9). Row t goes to
// slot slots[t] = block * page + offset; negative slots are skipped.
struct MlaCacheWriteArgs {
  int64_t T, d_c, d_r;
  DType dtype;  // of c, k_pe and of a bf16/f32 cache
  KvFormat kv_format;
  const void* c;     // [T, d_c], c_stride elements between rows
  const void* k_pe;  // [T, d_r], k_pe_stride elements between rows
  int64_t c_stride, k_pe_stride;
  const int32_t* slots;  // [T]
  void* cache;           // rows of mla_cache_row_bytes
};

// Rows [0, s) of one sequence out of a paged latent cache, in order, as elements of dtype (records
// are dequantised and rounded to bf16 as the attention does).
struct MlaCacheGatherArgs {
  int64_t s, d_c, d_r, page;
  DType dtype;  // of out and of a bf16/f32 cache
  KvFormat kv_format;
  const int32_t* block_table;  // [ceil(s / page)] of this sequence
  const void* cache;
  void* out;  // [s, d_c + d_r]
};

// Bytes of one cache row. fp8: d_c codes, d_c/128 (rounded up) fp32 scales, d_r bf16 (SPEC 1.9).
V3B_HD constexpr int64_t mla_cache_row_bytes(KvFormat f, DType dtype, int64_t d_c, int64_t d_r) {
  return f == KvFormat::bf16 ? (d_c + d_r) * dtype_bytes(dtype)
                             : d_c + 4 * ((d_c + 127) / 128) + 2 * d_r;
}

}  // namespace v3b::spec
