// Dense products through NVIDIA's libraries: CUTLASS for Hopper (TMA and wgmma, compiled in where its headers are found),
// cuBLASLt (opened at run time, so that the binary starts without it). CUTLASS: bf16 or E4M3 with A [m,k], B [n,k].
#pragma once
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "kernels/core/cuda.h"
#include "kernels/gemm/gemm.h"
#include "reference/spec/fp8_gemm.h"
#include "reference/spec/lm_head_ce.h"

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

// cuBLASLt with the first algorithm of its heuristics. gemm: any transposition; f32 in full fp32. FP8: 1x128 by 128x128
// scales, capability 9.0 only (fp8_gemm.cuda_cublaslt.cpp says why). A plan is for one shape; its making needs the device.
struct CublasLtPlan;
inline constexpr int64_t kCublasLtScratchBytes = int64_t{32} << 20;  // of the library itself
// Empty where cublaslt_plan(a) would succeed, else why not.
std::string cublaslt_refuses(const GemmArgs& g);
std::string cublaslt_refuses(const spec::Fp8GemmArgs& a);
CublasLtPlan* cublaslt_plan(const GemmArgs& g);  // throws v3b::Error where it refuses
CublasLtPlan* cublaslt_plan(const spec::Fp8GemmArgs& a);
void cublaslt_free(CublasLtPlan* plan);
// scratch: kCublasLtScratchBytes.
void gemm_cuda_cublaslt(const GemmArgs& g, const CublasLtPlan& plan, void* scratch,
                        CudaStream stream);
// The scales are brought into the library's layout in the scratch, part of the call; so is a copy of the rows where m is no
// multiple of 4. n and k multiples of 16.
int64_t fp8_gemm_cublaslt_scratch_bytes(const spec::Fp8GemmArgs& a);
void fp8_gemm_cuda_cublaslt(const spec::Fp8GemmArgs& a, CublasLtPlan& plan, void* scratch,
                            CudaStream stream);

// Output head: the logits by cuBLASLt, folded by our kernels. One plan a shape of block.
struct LmHeadCublasLtPlan {
  explicit LmHeadCublasLtPlan(const spec::LmHeadCeArgs& a);  // throws v3b::Error where it refuses
  std::vector<GemmArgs> shapes;
  std::vector<std::shared_ptr<CublasLtPlan>> plans;
};
std::string lm_head_cublaslt_refuses(const spec::LmHeadCeArgs& a);
// library_scratch: kCublasLtScratchBytes; scratch: lm_head_ce_cuda_scratch_bytes.
void lm_head_ce_cuda_cublaslt(const spec::LmHeadCeArgs& a, const LmHeadCublasLtPlan& plan,
                              void* library_scratch, void* scratch, CudaStream stream);

}  // namespace v3b::kern
