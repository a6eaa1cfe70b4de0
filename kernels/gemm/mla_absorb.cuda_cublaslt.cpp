// The absorbed projections as one strided-batched product of cuBLASLt, a head a member.
#include "kernels/gemm/mla_absorb.h"

#include "kernels/gemm/gemm_libs_cuda.h"
#include "model/error.h"

#if defined(V3B_HAVE_CUBLASLT)
#include "kernels/gemm/cublaslt_plan.h"

namespace v3b::kern {
namespace {
std::unique_ptr<CublasLtPlan> plan(const spec::MlaAbsorbArgs& a, bool& found) {
  cublaslt().get();
  const HeadProducts h = head_products(a);
  auto p = std::make_unique<CublasLtPlan>();
  p->set(CUBLASLT_MATMUL_DESC_TRANSA, CUBLAS_OP_T);
  p->set(CUBLASLT_MATMUL_DESC_TRANSB, CUBLAS_OP_N);
  p->layouts(a.dtype, a.dtype, a.k, a.n, h.g.ldb, a.k, a.T, h.g.lda, a.n, a.T, h.g.ldc);
  p->batch(h.count, h.stride_b, h.stride_a, h.stride_c);
  found = p->choose();
  return p;
}
}  // namespace

std::string cublaslt_refuses(const spec::MlaAbsorbArgs& a) {
  return refusal([&](bool& found) { plan(a, found); });
}
CublasLtPlan* cublaslt_plan(const spec::MlaAbsorbArgs& a) {
  bool found = false;
  auto p = plan(a, found);
  if (!found) throw Error(ExitCode::usage, kNoAlgorithm, "cublasLtMatmulAlgoGetHeuristic");
  return p.release();
}
void mla_absorb_cuda_cublaslt(const spec::MlaAbsorbArgs& a, const CublasLtPlan& plan, void* scratch,
                              CudaStream stream) {
  plan.run(a.w, a.x, a.y, 0.0f, scratch, stream);
}

}  // namespace v3b::kern

#else

namespace v3b::kern {
std::string cublaslt_refuses(const spec::MlaAbsorbArgs&) { return cublaslt_missing(); }
CublasLtPlan* cublaslt_plan(const spec::MlaAbsorbArgs&) {
  throw Error(ExitCode::usage, cublaslt_missing(), "cuBLASLt product");
}
void mla_absorb_cuda_cublaslt(const spec::MlaAbsorbArgs&, const CublasLtPlan&, void*, CudaStream) {
  throw Error(ExitCode::usage, cublaslt_missing(), "cuBLASLt product");
}
}  // namespace v3b::kern
#endif
