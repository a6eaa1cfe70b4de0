// Dense products through NVIDIA's libraries: CUTLASS for Hopper (TMA and wgmma, compiled in where its headers are found),
// cuBLASLt (opened at run time, so that the binary starts without it). All bf16 or E4M3 with A [m,k], B [n,k].
#pragma once
#include <cstdint>
#include <string>

#include "kernels/core/cuda.h"
#include "kernels/gemm/gemm.h"
#include "reference/spec/fp8_gemm.h"

namespace v3b::kern {

// Empty where the entries below can be called, else why not in a few words. They throw v3b::Error then.
std::string cutlass_missing();
std::string cublaslt_missing();

// CUTLASS, sm_90a only. C bf16, no accumulation, k and n multiples of 8, 16-byte aligned pointers.
int64_t gemm_cutlass_sm90_scratch_bytes(const GemmArgs& g);
void gemm_cuda_cutlass_sm90(const GemmArgs& g, void* scratch, CudaStream stream);
// SPEC 1.23 with wgmma and promotion every 128 of k. C bf16, m a multiple of 4, k of 128, n of 8. The scales are brought
// into CUTLASS's layout ([ceil(k/128), m] and [ceil(k/128), ceil(n/128)]) in the scratch, part of the call.
int64_t fp8_gemm_cutlass_sm90_scratch_bytes(const spec::Fp8GemmArgs& a);
void fp8_gemm_cuda_cutlass_sm90(const spec::Fp8GemmArgs& a, void* scratch, CudaStream stream);

// cuBLASLt with the first algorithm of its heuristics. Any transposition; f32 in full fp32. The plan is made at the first
// call of a shape and kept in `plan` (create with cublaslt_plan, one per problem; freed by cublaslt_free).
struct CublasLtPlan;
inline constexpr int64_t kCublasLtScratchBytes = int64_t{32} << 20;
CublasLtPlan* cublaslt_plan(const GemmArgs& g);  // throws Error where the library has no algorithm
CublasLtPlan* cublaslt_plan(
    const spec::Fp8GemmArgs& a);  // 1x128 by 128x128 scales; m and n multiples of 16
void cublaslt_free(CublasLtPlan* plan);
void gemm_cuda_cublaslt(const GemmArgs& g, const CublasLtPlan& plan, void* scratch,
                        CudaStream stream);
// Scales of the activations: the library wants them [ceil(k/128), m]; `sa` is copied so by the call (scratch behind the
// library's own: m * ceil(k/128) * 4 bytes more).
void fp8_gemm_cuda_cublaslt(const spec::Fp8GemmArgs& a, const CublasLtPlan& plan, void* scratch,
                            CudaStream stream);

}  // namespace v3b::kern
