// Expert products on CUDA (SPEC 1.13, 1.14, 1.16): grouped SwiGLU feed-forward over rows sorted by expert. Device pointers,
// everything on `stream`, sizes that depend on the routes are looked up on the device: no host round trip, capturable.
#pragma once
#include "kernels/core/cuda.h"
#include "reference/spec/moe_dispatch.h"
#include "reference/spec/moe_experts.h"

namespace v3b::kern {

// Which rows belong to which expert.
//   contiguous: rows of e are offsets[e] .. offsets[e+1] (moe_dispatch), at most max_rows in all
//   masked: offsets null; rows of e are e*capacity .. e*capacity + counts[e] (counts null: all of capacity)
struct MoeGroups {
  int64_t E = 1;
  const int64_t* offsets = nullptr;  // [E+1]
  int64_t max_rows = 0;              // of all experts
  int64_t max_of_one = 0;  // of one expert (0: not known); chooses the kernel, any rows are right
  const int32_t* counts = nullptr;  // [E]
  int64_t capacity = 0;
};

// One feed-forward over grouped rows: hidden = silu(x Wg^T) * (x Wu^T), out = hidden Wd^T, without weights and combine.
struct MoeFfnArgs {
  MoeGroups groups;
  int64_t d, m;
  spec::DType x_type, w_type;        // see the entries
  const void* x;                     // rows [., d]
  const float* x_scale;              // [., ceil(d/128)] of E4M3 x, else null
  const int32_t* source;             // row -> row of x (fused gather), or null: the same
  const spec::FfnPointers* experts;  // [E], an array in device memory
  void* hidden;                      // [rows, m]: bf16 (f32 where x is f32)
  spec::f8e4m3* hidden_codes;        // [rows, m] and
  float* hidden_scale;               // [rows, ceil(m/128)]: for E4M3 x, else null
  float* out;                        // [rows, d]
};
// Tensor cores. x bf16 with w bf16 or E4M3 (codes are exact in bf16, 128x128 scales promoted every 128 of k).
void moe_ffn_cuda_mma(const MoeFfnArgs& a, CudaStream stream);
// E4M3 x and w (SPEC 1.23; hidden rounded to bf16, quantised 1x128 with fp32 scales). Capability 8.9 or later.
void moe_ffn_fp8_cuda_mma(const MoeFfnArgs& a, CudaStream stream);
// fp32 FMA; x f32 or bf16, w f32, bf16 or E4M3; hidden in x's type.
void moe_ffn_cuda_simt(const MoeFfnArgs& a, CudaStream stream);

// The whole op: plan, gather fused into the first product, experts, shared expert, weighted combine (fp32, k ascending,
// then the shared one, one rounding). a.experts is an array in device memory; experts that nobody chose are not read.
// Scratch: device memory of moe_experts_cuda_scratch_bytes, 256-byte aligned, contents do not matter.
int64_t moe_experts_cuda_scratch_bytes(const spec::MoeExpertsArgs& a);
// x bf16 with w bf16 or E4M3; x E4M3 (x_scale) with w E4M3: capability 8.9 or later, moe_accum fp32.
void moe_experts_cuda_mma(const spec::MoeExpertsArgs& a, void* scratch, CudaStream stream);
// Every pair of types but E4M3 x.
void moe_experts_cuda_simt(const spec::MoeExpertsArgs& a, void* scratch, CudaStream stream);
// The last step alone: c.rows of rows_type (f32, or bf16 with bf16 y), shared_rows [T, d] of rows_type or null.
void moe_experts_combine_cuda_simt(const spec::MoeCombineArgs& c, spec::DType rows_type,
                                   const void* shared_rows, CudaStream stream);

}  // namespace v3b::kern
