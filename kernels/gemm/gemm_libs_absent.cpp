// What stands in for library forms that this build leaves out.
#include "kernels/gemm/gemm_libs_cuda.h"
#include "model/error.h"

namespace v3b::kern {

#if !defined(V3B_HAVE_CUTLASS)
std::string cutlass_missing() {
#if defined(V3B_HAVE_CUBLASLT)
  return "built without the CUTLASS headers";
#else
  return "built without CUDA";
#endif
}
namespace {
[[noreturn]] void no_cutlass() {
  throw Error(ExitCode::usage, cutlass_missing(), "CUTLASS product");
}
}  // namespace
int64_t gemm_cutlass_sm90_scratch_bytes(const GemmArgs&) { no_cutlass(); }
void gemm_cuda_cutlass_sm90(const GemmArgs&, void*, CudaStream) { no_cutlass(); }
int64_t fp8_gemm_cutlass_sm90_scratch_bytes(const spec::Fp8GemmArgs&) { no_cutlass(); }
void fp8_gemm_cuda_cutlass_sm90(const spec::Fp8GemmArgs&, void*, CudaStream) { no_cutlass(); }
#endif

#if !defined(V3B_HAVE_CUBLASLT)
std::string cublaslt_missing() { return "built without CUDA"; }
namespace {
[[noreturn]] void no_cublaslt() {
  throw Error(ExitCode::usage, cublaslt_missing(), "cuBLASLt product");
}
}  // namespace
std::string cublaslt_refuses(const GemmArgs&) { return cublaslt_missing(); }
std::string cublaslt_refuses(const spec::Fp8GemmArgs&) { return cublaslt_missing(); }
CublasLtPlan* cublaslt_plan(const GemmArgs&) { no_cublaslt(); }
CublasLtPlan* cublaslt_plan(const spec::Fp8GemmArgs&) { no_cublaslt(); }
void cublaslt_free(CublasLtPlan*) {}
void gemm_cuda_cublaslt(const GemmArgs&, const CublasLtPlan&, void*, CudaStream) { no_cublaslt(); }
int64_t fp8_gemm_cublaslt_scratch_bytes(const spec::Fp8GemmArgs&) { no_cublaslt(); }
void fp8_gemm_cuda_cublaslt(const spec::Fp8GemmArgs&, CublasLtPlan&, void*, CudaStream) {
  no_cublaslt();
}
#endif

}  // namespace v3b::kern
