// Attention on the CPU: OpenMP and Highway, bf16 dot products where the machine has AVX512_BF16
// (rows.h tells how). f32 and bf16 storage; scores, softmax and sums in fp32, P rounded to bf16
// when the storage is bf16. scale > 0.
#pragma once
#include "reference/spec/attention.h"
#include "reference/spec/mla_cache_write.h"
#include "reference/spec/rope.h"

namespace v3b::kern {

// Causal prefill, any n_h, n_kv (n_h a multiple of n_kv), d_qk, d_v. FLOP 2 n_h (d_qk + d_v) (T s0
// + T (T+1) / 2); least bytes q, k, v, o once. Bound by arithmetic from T of about 16 on.
void attention_prefill_cpu_simd(const spec::AttentionArgs& a) noexcept;
// The same for expanded MLA, reading [k_nope | v] and k_pe where the projections left them.
void mla_prefill_cpu_simd(const spec::MlaPrefillArgs& a) noexcept;

// Keys' latents to [k_nope | v] of all heads: out [tokens, outputs] = c [tokens, d_c] w [outputs, d_c]^T, dense rows of
// dtype (f32 or bf16), sums in fp32. FLOP 2 tokens outputs d_c; least bytes w, c, out once.
struct MlaExpandArgs {
  int64_t tokens, outputs, d_c;
  spec::DType dtype;
  const void* c;
  const void* w;
  void* out;
};
void mla_expand_cpu_simd(const MlaExpandArgs& a) noexcept;

// One query a sequence. FLOP 2 n_h (d_qk + d_v) s; least bytes n_kv (d_qk + d_v) e s: bound by
// reading for n_h / n_kv up to about 8.
void attention_decode_cpu_simd(const spec::AttentionDecodeArgs& a) noexcept;
// Absorbed MLA on the paged latent cache. FLOP 2 n_h s_q (2 d_c + d_r) s; least bytes one cache row
// a key. 16 heads 30 FLOP a byte in bf16, 128 heads 242: arithmetic. Keys are split over threads
// and merged.
void mla_decode_cpu_simd(const spec::MlaDecodeArgs& a) noexcept;

// Bytes only: (d_c + d_r) e in, one row out.
void mla_cache_write_cpu_simd(const spec::MlaCacheWriteArgs& a) noexcept;
// The same with k_pe as it is before its rotation.
struct MlaCacheRope {
  spec::RopeForm form;
  const float* cos;  // [positions, d_r/2]
  const float* sin;
  const int32_t* positions;  // [T] rows of the tables
};
void mla_cache_write_rope_cpu_simd(const spec::MlaCacheWriteArgs& a,
                                   const MlaCacheRope& rope) noexcept;
const char* mla_cache_write_cpu_simd_isa(const spec::MlaCacheWriteShape& s) noexcept;
// One cache row in, (d_c + d_r) e out.
void mla_cache_gather_cpu_simd(const spec::MlaCacheGatherArgs& a) noexcept;

// The same composed of oneDNN products with softmax between: baselines.
void attention_prefill_cpu_onednn(const spec::AttentionArgs& a) noexcept;
void mla_prefill_cpu_onednn(const spec::MlaPrefillArgs& a) noexcept;
void mla_decode_cpu_onednn(const spec::MlaDecodeArgs& a) noexcept;

const char* attention_cpu_simd_isa(spec::DType dtype) noexcept;  // what runs here

}  // namespace v3b::kern
