// The experts through cuBLAS (moe_experts.cuda_cublas.cpp): a baseline of library products around our row kernels.
//   dispatch with gather (ours) -> one grouped product for gate and up of all chosen experts and the shared one
//   -> SwiGLU (ours) -> one grouped product for down -> weighted combine (ours)
// Timed: all of that on the device. Not timed: cublasGemmGroupedBatchedEx takes group sizes from host memory, which a real
// step knows on the device only; here they are counted from the routes when the plan is made, together with the tables of
// pointers. A real step would copy E counts to the host, wait for them and upload tables: 20 us and more a layer, and no
// CUDA graph could hold it. The baseline's times are what the products themselves can do, not what a decode step would get.
#pragma once
#include <cstdint>
#include <string>

#include "kernels/core/cuda.h"
#include "reference/spec/moe_experts.h"

namespace v3b::kern {

std::string
moe_cublas_missing();  // empty where the entries below can be called; else they throw v3b::Error
struct MoeCublasPlan;
int64_t moe_experts_cublas_scratch_bytes(const spec::MoeExpertsArgs& a);
// x and weights both bf16 (d, m, shared_m multiples of 8: rows of 16 bytes) or both f32; moe_accum fp32. `a`: device
// pointers, but a.experts is host memory (the weights it names are on the device); idx: the routes in host memory, those of
// a.idx. scratch: device memory, 256-byte aligned, belongs to the plan from here on. bf16: gate, up and the experts' rows
// are rounded to bf16 between the steps, as the library offers bf16 products.
MoeCublasPlan* moe_cublas_plan(const spec::MoeExpertsArgs& a, const int32_t* idx, void* scratch,
                               CudaStream stream);
void moe_cublas_free(MoeCublasPlan* plan);
void moe_experts_cuda_cublas(const MoeCublasPlan& plan, CudaStream stream);

}  // namespace v3b::kern
