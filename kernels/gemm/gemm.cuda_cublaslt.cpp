// Dense products through cuBLASLt. A row-major product C = A B^T is the column-major C^T = B A^T: the library's first
// operand is our B.
#if defined(V3B_HAVE_CUBLASLT)
#include <dlfcn.h>

#include <cstdlib>

#include "kernels/gemm/cublaslt_plan.h"

namespace v3b::kern {
namespace {

cudaDataType_t type_of(spec::DType t) {
  switch (t) {
    case spec::DType::bf16:
      return CUDA_R_16BF;
    case spec::DType::f32:
      return CUDA_R_32F;
    default:
      return CUDA_R_8F_E4M3;
  }
}

std::unique_ptr<CublasLtPlan> plan(const GemmArgs& g, bool& found) {
  cublaslt().get();
  auto p = std::make_unique<CublasLtPlan>();
  p->set(CUBLASLT_MATMUL_DESC_TRANSA, g.trans_b ? CUBLAS_OP_T : CUBLAS_OP_N);
  p->set(CUBLASLT_MATMUL_DESC_TRANSB, g.trans_a ? CUBLAS_OP_T : CUBLAS_OP_N);
  p->layouts(g.ab_type, g.c_type, g.trans_b ? g.K : g.N, g.trans_b ? g.N : g.K, g.ldb,
             g.trans_a ? g.M : g.K, g.trans_a ? g.K : g.M, g.lda, g.N, g.M, g.ldc);
  found = p->choose();
  return p;
}

}  // namespace

void* open_cublas(const char* name, std::string& missing) {
  const std::string file = std::string(name) + ".so." + std::to_string(CUBLAS_VER_MAJOR);
  if (const char* own = std::getenv("V3BENCH_CUBLAS"); own != nullptr) {  // one file for both
    void* so = dlopen(own, RTLD_NOW | RTLD_LOCAL);
    if (so == nullptr) missing = std::string(own) + " (V3BENCH_CUBLAS) cannot be opened";
    return so;
  }
  void* so = dlopen(file.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (so == nullptr) so = dlopen(("/usr/local/cuda/lib64/" + file).c_str(), RTLD_NOW | RTLD_LOCAL);
  if (so == nullptr) missing = file + " not found";
  return so;
}

CublasLt::CublasLt() {
  void* so = open_cublas("libcublasLt", missing);
  if (so == nullptr) return;
#define V3B_LT(f)                                      \
  f = reinterpret_cast<decltype(&::f)>(dlsym(so, #f)); \
  if (f == nullptr) missing = "libcublasLt has no " #f;
  V3B_LT_FUNCTIONS(V3B_LT)
#undef V3B_LT
}
void CublasLt::check(cublasStatus_t s, const char* where) const {
  if (s != CUBLAS_STATUS_SUCCESS)
    throw Error(ExitCode::usage, "cuBLASLt status " + std::to_string(static_cast<int>(s)), where);
}
cublasLtHandle_t CublasLt::get() {
  if (!missing.empty()) throw Error(ExitCode::usage, missing, "cuBLASLt product");
  if (handle == nullptr) check(cublasLtCreate(&handle), "cublasLtCreate");
  return handle;
}
CublasLt& cublaslt() {
  static CublasLt l;
  return l;
}

CublasLtPlan::CublasLtPlan() {
  cublaslt().check(cublaslt().cublasLtMatmulDescCreate(&desc, CUBLAS_COMPUTE_32F, CUDA_R_32F),
                   "cublasLtMatmulDescCreate");
}
CublasLtPlan::~CublasLtPlan() {
  const CublasLt& l = cublaslt();
  if (desc != nullptr) l.cublasLtMatmulDescDestroy(desc);
  for (const auto x : {a, b, c})
    if (x != nullptr) l.cublasLtMatrixLayoutDestroy(x);
}
void CublasLtPlan::layouts(spec::DType in, spec::DType out, int64_t a_rows, int64_t a_cols,
                           int64_t lda, int64_t b_rows, int64_t b_cols, int64_t ldb, int64_t c_rows,
                           int64_t c_cols, int64_t ldc) {
  const auto make = [](cublasLtMatrixLayout_t* to, spec::DType t, int64_t rows, int64_t cols,
                       int64_t ld) {
    cublaslt().check(
        cublaslt().cublasLtMatrixLayoutCreate(to, type_of(t), static_cast<uint64_t>(rows),
                                              static_cast<uint64_t>(cols), ld),
        "cublasLtMatrixLayoutCreate");
  };
  make(&a, in, a_rows, a_cols, lda);
  make(&b, in, b_rows, b_cols, ldb);
  make(&c, out, c_rows, c_cols, ldc);
}
void CublasLtPlan::batch(int64_t count, int64_t stride_a, int64_t stride_b, int64_t stride_c) {
  const auto many = static_cast<int32_t>(count);
  const std::pair<cublasLtMatrixLayout_t, int64_t> all[] = {
      {a, stride_a}, {b, stride_b}, {c, stride_c}};
  for (const auto& [layout, stride] : all) {
    cublaslt().check(cublaslt().cublasLtMatrixLayoutSetAttribute(
                         layout, CUBLASLT_MATRIX_LAYOUT_BATCH_COUNT, &many, sizeof many),
                     "cublasLtMatrixLayoutSetAttribute");
    cublaslt().check(
        cublaslt().cublasLtMatrixLayoutSetAttribute(
            layout, CUBLASLT_MATRIX_LAYOUT_STRIDED_BATCH_OFFSET, &stride, sizeof stride),
        "cublasLtMatrixLayoutSetAttribute");
  }
}
// Partial sums of a split k may be kept in fp32 only: a reduction in the output's bf16 would round twice.
bool CublasLtPlan::choose() {
  CublasLt& l = cublaslt();
  cublasLtMatmulPreference_t want = nullptr;
  l.check(l.cublasLtMatmulPreferenceCreate(&want), "cublasLtMatmulPreferenceCreate");
  const size_t bytes = static_cast<size_t>(kCublasLtScratchBytes);
  const uint32_t schemes = CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE;
  cublasLtMatmulHeuristicResult_t result{};
  int found = 0;
  cublasStatus_t s = l.cublasLtMatmulPreferenceSetAttribute(
      want, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, &bytes, sizeof bytes);
  if (s == CUBLAS_STATUS_SUCCESS)
    s = l.cublasLtMatmulPreferenceSetAttribute(want, CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK,
                                               &schemes, sizeof schemes);
  if (s == CUBLAS_STATUS_SUCCESS)
    s = l.cublasLtMatmulAlgoGetHeuristic(l.get(), desc, a, b, c, c, want, 1, &result, &found);
  l.cublasLtMatmulPreferenceDestroy(want);
  if (s != CUBLAS_STATUS_SUCCESS || found == 0 || result.state != CUBLAS_STATUS_SUCCESS)
    return false;
  algo = result.algo;
  return true;
}
void CublasLtPlan::run(const void* lib_a, const void* lib_b, void* to, float beta, void* scratch,
                       CudaStream stream) const {
  CublasLt& l = cublaslt();
  const float alpha = 1;
  l.check(l.cublasLtMatmul(l.get(), desc, &alpha, lib_a, a, lib_b, b, &beta, to, c, to, c, &algo,
                           scratch, static_cast<size_t>(kCublasLtScratchBytes), stream),
          "cublasLtMatmul");
}

std::string cublaslt_missing() { return cublaslt().missing; }
std::string cublaslt_refuses(const GemmArgs& g) {
  return refusal([&](bool& found) { plan(g, found); });
}
CublasLtPlan* cublaslt_plan(const GemmArgs& g) {
  bool found = false;
  auto p = plan(g, found);
  if (!found) throw Error(ExitCode::usage, kNoAlgorithm, "cublasLtMatmulAlgoGetHeuristic");
  return p.release();
}
void cublaslt_free(CublasLtPlan* plan) { delete plan; }
void gemm_cuda_cublaslt(const GemmArgs& g, const CublasLtPlan& plan, void* scratch,
                        CudaStream stream) {
  plan.run(g.b, g.a, g.c, g.accumulate ? 1.0f : 0.0f, scratch, stream);
}

}  // namespace v3b::kern
#endif
