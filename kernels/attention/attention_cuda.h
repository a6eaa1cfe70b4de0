// Attention on CUDA (SPEC 1.5, 1.7-1.9): arguments as in reference/spec/attention.h, pointers are device memory, work
// is put on the stream, nothing is allocated and nothing waits for the device, so a CUDA graph can capture every entry.
// Lengths are read on the device only; the grids depend on the other arguments. Throws v3b::Error on a failing launch.
//
// cuda_mma: bf16 on tensor cores (mma.sync, sm_80 and later), scores and sums in fp32, P rounded to bf16.
// cuda_simt: f32 or bf16, any dimensions, fp32 throughout. scale > 0 everywhere.
// Rows that are 16-byte aligned with dimensions that are multiples of 8 are read by cp.async; others work, slower.
#pragma once
#include <cstdint>

#include "kernels/core/cuda.h"
#include "reference/spec/attention.h"

namespace v3b::kern {

// Causal prefill. FLOP 2 n_h (d_qk + d_v) pairs; bytes q, k, v, o once: bound by arithmetic from a few hundred keys on.
// mma: d_qk <= 256 and d_v <= 256 (attention_prefill_cuda_mma_takes); simt: d_v <= 1024.
bool attention_prefill_cuda_mma_takes(int64_t d_qk, int64_t d_v);
void attention_prefill_cuda_mma(const spec::AttentionArgs& a, CudaStream stream);
void attention_prefill_cuda_simt(const spec::AttentionArgs& a, CudaStream stream);
// The same from what the kv_b product leaves; no key is built. mla_prefill_cuda_mma: d_n + d_r <= 256, d_v <= 256.
void mla_prefill_cuda_mma(const spec::MlaPrefillArgs& a, CudaStream stream);
void mla_prefill_cuda_simt(const spec::MlaPrefillArgs& a, CudaStream stream);

// Decode: the keys of all sequences together are cut into equal parts (split_schedule.h), one a block; partial results
// go to `scratch` (256-byte aligned, ..._scratch_bytes(a) bytes, contents ignored) and a second kernel merges them. The
// bytes depend on B, s_q, heads, dimensions, page and max_blocks only.
bool attention_decode_cuda_mma_takes(int64_t d_qk, int64_t d_v);  // both <= 256
int64_t attention_decode_cuda_mma_scratch_bytes(const spec::AttentionDecodeArgs& a);
int64_t attention_decode_cuda_simt_scratch_bytes(const spec::AttentionDecodeArgs& a);
void attention_decode_cuda_mma(const spec::AttentionDecodeArgs& a, void* scratch,
                               CudaStream stream);
void attention_decode_cuda_simt(const spec::AttentionDecodeArgs& a, void* scratch,
                                CudaStream stream);

// Absorbed MLA on the paged latent cache, all three cache formats. FLOP 2 n_h s_q (2 d_c + d_r) s, bytes one cache row a
// key: bound by bytes at 16 heads (30 FLOP a byte in bf16), by arithmetic at 128.
bool mla_decode_cuda_mma_takes(int64_t d_c, int64_t d_r);  // d_c <= 512, d_r <= 64
// shared_bytes: what a block may have, 0: as the device says. It chooses the tile (64 keys from 226 KiB on, else 32).
int64_t mla_decode_cuda_mma_scratch_bytes(const spec::MlaDecodeArgs& a, int64_t shared_bytes = 0);
int64_t mla_decode_cuda_simt_scratch_bytes(const spec::MlaDecodeArgs& a);
void mla_decode_cuda_mma(const spec::MlaDecodeArgs& a, void* scratch, CudaStream stream,
                         int64_t shared_bytes = 0);
void mla_decode_cuda_simt(const spec::MlaDecodeArgs& a, void* scratch, CudaStream stream);

// Bytes only. The cache gets the bits that reference/kv_cache writes. One warp a row.
void mla_cache_write_cuda_simt(const spec::MlaCacheWriteArgs& a, CudaStream stream);
void mla_cache_gather_cuda_simt(const spec::MlaCacheGatherArgs& a, CudaStream stream);

}  // namespace v3b::kern
