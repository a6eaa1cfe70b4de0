// Output head with cross-entropy: every block of logits by cuBLASLt, folded by our kernels (lm_head_ce.cuda_mma.cu). Bounds
// as there. The blocks are the same 32 MiB: what differs is the product alone.
#include "kernels/gemm/gemm_libs_cuda.h"
#include "kernels/gemm/rows_cuda.h"
#include "model/error.h"

namespace v3b::kern {

std::string lm_head_cublaslt_refuses(const spec::LmHeadCeArgs& a) {
  for (const GemmArgs& g : lm_head_ce_cuda_products(a))
    if (std::string why = cublaslt_refuses(g); !why.empty()) return why;
  return "";
}
LmHeadCublasLtPlan::LmHeadCublasLtPlan(const spec::LmHeadCeArgs& a)
    : shapes(lm_head_ce_cuda_products(a)) {
  for (const GemmArgs& g : shapes) plans.emplace_back(cublaslt_plan(g), cublaslt_free);
}
void lm_head_ce_cuda_cublaslt(const spec::LmHeadCeArgs& a, const LmHeadCublasLtPlan& plan,
                              void* library_scratch, void* scratch, CudaStream stream) {
  lm_head_ce_cuda_by(a, scratch, stream, [&](const GemmArgs& g) {
    for (size_t i = 0; i < plan.shapes.size(); ++i)
      if (plan.shapes[i].M == g.M && plan.shapes[i].N == g.N)
        return gemm_cuda_cublaslt(g, *plan.plans[i], library_scratch, stream);
    throw Error(ExitCode::usage, "a block of logits without a plan", "lm_head_ce.cuda_cublaslt");
  });
}

}  // namespace v3b::kern
