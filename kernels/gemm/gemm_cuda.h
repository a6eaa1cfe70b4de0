// Dense products on CUDA (SPEC 0.1, 1.23): device pointers, everything on `stream`, no allocation, no scratch, no host
// round trip, so a CUDA graph can capture every entry. Throws v3b::Error on a failing launch. Any m, n, k >= 0.
#pragma once
#include "kernels/core/cuda.h"
#include "kernels/gemm/gemm.h"
#include "reference/spec/fp8_gemm.h"

namespace v3b::kern {

// C (+)= op(A) op(B) as GemmArgs says (kernels/gemm/gemm.h), with device pointers. bf16 with trans_a = false,
// trans_b = true (the forward's y = x W^T) runs on tensor cores: few rows stream the weights, more rows use
// shared-memory tiles; everything else goes to gemm_cuda_simt. Rows that are not 16-byte aligned are allowed and slower.
// accumulate: with c_type f32 the sum stays in fp32; bf16 C is read, added in fp32 and rounded once.
void gemm_cuda_mma(const GemmArgs& g, CudaStream stream);
// The same without tensor cores: fp32 FMA, any transposition, f32 or bf16.
void gemm_cuda_simt(const GemmArgs& g, CudaStream stream);
// `count` independent problems of equal shape at element strides (heads: absorbed projections).
void gemm_batched_cuda_mma(const GemmArgs& g, int64_t count, int64_t stride_a, int64_t stride_b,
                           int64_t stride_c, CudaStream stream);

// SPEC 1.23: 1x128 by 128x128 block scales, E4M3 tensor cores, every 128 of k promoted into fp32 with the scales. Needs
// compute capability 8.9 or later.
void fp8_gemm_cuda_mma(const spec::Fp8GemmArgs& a, CudaStream stream);

}  // namespace v3b::kern
