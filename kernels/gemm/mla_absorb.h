// The absorbed projections (SPEC 1.8) as batched products over heads. 2 T n_h n k FLOPs; least bytes: the weights once
// (16.8 MB a side for V3 in bf16), x and y once: below some 100 rows bound by the weights.
#pragma once
#include <memory>
#include <string>

#include "kernels/core/cuda.h"
#include "kernels/gemm/gemm.h"
#include "reference/spec/mla_absorb.h"

namespace v3b::kern {

// The batched product that it is: strides of a head in elements.
struct HeadProducts {
  GemmArgs g;
  int64_t count, stride_a, stride_b, stride_c;
};
inline HeadProducts head_products(const spec::MlaAbsorbArgs& a) {
  HeadProducts p{{a.T, a.n, a.k}, a.n_h, a.k, a.n * a.k, a.n};
  p.g.a = a.x, p.g.lda = a.n_h * a.k;
  p.g.b = a.w, p.g.ldb = a.k;
  p.g.c = a.y, p.g.ldc = a.n_h * a.n;
  p.g.ab_type = p.g.c_type = a.dtype;
  return p;
}

// On the weight as it lies; the decode step runs packed_heads() of packed_ops.h.
void mla_absorb_cpu_simd(const spec::MlaAbsorbArgs& a) noexcept;
// Baseline: oneDNN alone.
void mla_absorb_cpu_onednn(const spec::MlaAbsorbArgs& a) noexcept;

// Device pointers. bf16.
void mla_absorb_cuda_mma(const spec::MlaAbsorbArgs& a, CudaStream stream);

// One strided-batched product of cuBLASLt; scratch: kCublasLtScratchBytes.
struct CublasLtPlan;
std::string cublaslt_refuses(const spec::MlaAbsorbArgs& a);
CublasLtPlan* cublaslt_plan(const spec::MlaAbsorbArgs& a);
void mla_absorb_cuda_cublaslt(const spec::MlaAbsorbArgs& a, const CublasLtPlan& plan, void* scratch,
                              CudaStream stream);

}  // namespace v3b::kern
