// Routing, dispatch and combine on CUDA (SPEC 1.11-1.14). Arguments as in reference/spec, pointers are device memory;
// work is put on the stream, nothing comes back to the host: a captured graph replays it for other routes. T = 0 is legal.
#pragma once
#include "kernels/core/cuda.h"
#include "reference/spec/moe_dispatch.h"
#include "reference/spec/router.h"

namespace v3b::kern {

inline constexpr int64_t kRouterMaxExperts = 1024, kRouterMaxK = 32;

// E <= 1024, K <= 32 (else throws v3b::Error), any groups, scoring, mask, bias. One warp a token. NaN scores come after
// every number; ties go to the lower index.
void router_cuda_simt(const spec::RouterSelectArgs& a, CudaStream stream);

// Dropping by capacity, counts, stable permutation, gather. Deterministic, no atomics. rows null: the plan (offsets, row) alone.
// Scratch of moe_dispatch_cuda_scratch_bytes (0 for few slots), contents do not matter.
int64_t moe_dispatch_cuda_scratch_bytes(const spec::MoeDispatchArgs& a);
void moe_dispatch_cuda_simt(const spec::MoeDispatchArgs& a, void* scratch, CudaStream stream);

// served[i] = idx[i], or -1 where the expert's capacity is full before slot i (SPEC 1.15); served [T, K] in place of
// a.keep, which is not read.
void moe_capacity_cuda_simt(const spec::MoeCapacityArgs& a, int32_t* served, CudaStream stream);

// Sum over k ascending in fp32, one rounding; or rows ascending in bf16 (moe_accum). Rows and weights of unused slots (row < 0) are not read into the sum.
void moe_combine_cuda_simt(const spec::MoeCombineArgs& a, CudaStream stream);

}  // namespace v3b::kern
