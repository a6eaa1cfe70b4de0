// cuBLASLt, opened at run time: the binary starts on machines without the library, one reason tells why it is missing.
// A row-major product C = A B^T is the column-major C^T = B A^T: the library's first operand is our B.
#if defined(V3B_HAVE_CUBLASLT)
#include <cublasLt.h>
#include <cuda_runtime_api.h>
#include <dlfcn.h>

#include <memory>

#include "kernels/gemm/gemm_libs_cuda.h"
#include "model/error.h"

namespace v3b::kern {
namespace {

// The functions used, by the library's own names.
#define V3B_LT_FUNCTIONS(F)               \
  F(cublasLtCreate)                       \
  F(cublasLtMatmul)                       \
  F(cublasLtMatmulDescCreate)             \
  F(cublasLtMatmulDescDestroy)            \
  F(cublasLtMatmulDescSetAttribute)       \
  F(cublasLtMatrixLayoutCreate)           \
  F(cublasLtMatrixLayoutDestroy)          \
  F(cublasLtMatmulPreferenceCreate)       \
  F(cublasLtMatmulPreferenceDestroy)      \
  F(cublasLtMatmulPreferenceSetAttribute) \
  F(cublasLtMatmulAlgoGetHeuristic)

struct Library {
  std::string missing;
  cublasLtHandle_t handle = nullptr;
#define V3B_LT(f) decltype(&::f) f = nullptr;
  V3B_LT_FUNCTIONS(V3B_LT)
#undef V3B_LT
  Library() {
    const std::string name = "libcublasLt.so." + std::to_string(CUBLAS_VER_MAJOR);
    void* so = dlopen(name.c_str(), RTLD_NOW | RTLD_LOCAL);
    if (so == nullptr) so = dlopen(("/usr/local/cuda/lib64/" + name).c_str(), RTLD_NOW);
    if (so == nullptr) {
      missing = name + " not found";
      return;
    }
#define V3B_LT(f)                                      \
  f = reinterpret_cast<decltype(&::f)>(dlsym(so, #f)); \
  if (f == nullptr) missing = name + " has no " #f;
    V3B_LT_FUNCTIONS(V3B_LT)
#undef V3B_LT
  }
  void check(cublasStatus_t s, const char* where) const {
    if (s != CUBLAS_STATUS_SUCCESS)
      throw Error(ExitCode::usage, "cuBLASLt status " + std::to_string(static_cast<int>(s)), where);
  }
  cublasLtHandle_t get() {
    if (!missing.empty()) throw Error(ExitCode::usage, missing, "cuBLASLt product");
    if (handle == nullptr) check(cublasLtCreate(&handle), "cublasLtCreate");
    return handle;
  }
};
Library& library() {
  static Library l;
  return l;
}
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

}  // namespace

struct CublasLtPlan {
  cublasLtMatmulDesc_t desc = nullptr;
  cublasLtMatrixLayout_t a = nullptr, b = nullptr, c = nullptr;
  cublasLtMatmulAlgo_t algo{};
  ~CublasLtPlan() {
    const Library& l = library();
    if (desc != nullptr) l.cublasLtMatmulDescDestroy(desc);
    for (const auto x : {a, b, c})
      if (x != nullptr) l.cublasLtMatrixLayoutDestroy(x);
  }
  template <class T>
  void set(cublasLtMatmulDescAttributes_t what, const T& v) {
    library().check(library().cublasLtMatmulDescSetAttribute(desc, what, &v, sizeof v),
                    "cublasLtMatmulDescSetAttribute");
  }
};

namespace {

// The first algorithm of the heuristics.
void choose(CublasLtPlan& p) {
  Library& l = library();
  cublasLtMatmulPreference_t want = nullptr;
  l.check(l.cublasLtMatmulPreferenceCreate(&want), "cublasLtMatmulPreferenceCreate");
  const size_t bytes = static_cast<size_t>(kCublasLtScratchBytes);
  cublasLtMatmulHeuristicResult_t result{};
  int found = 0;
  cublasStatus_t s = l.cublasLtMatmulPreferenceSetAttribute(
      want, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, &bytes, sizeof bytes);
  if (s == CUBLAS_STATUS_SUCCESS)
    s = l.cublasLtMatmulAlgoGetHeuristic(l.get(), p.desc, p.a, p.b, p.c, p.c, want, 1, &result,
                                         &found);
  l.cublasLtMatmulPreferenceDestroy(want);
  if (s != CUBLAS_STATUS_SUCCESS || found == 0)
    throw Error(ExitCode::usage, "cuBLASLt has no algorithm for this shape here",
                "cublasLtMatmulAlgoGetHeuristic");
  p.algo = result.algo;
}
void run(const CublasLtPlan& p, const void* ours_a, const void* ours_b, void* c, float beta,
         void* scratch, CudaStream stream) {
  Library& l = library();
  const float alpha = 1;
  l.check(l.cublasLtMatmul(l.get(), p.desc, &alpha, ours_b, p.a, ours_a, p.b, &beta, c, p.c, c, p.c,
                           &p.algo, scratch, static_cast<size_t>(kCublasLtScratchBytes), stream),
          "cublasLtMatmul");
}

}  // namespace

std::string cublaslt_missing() { return library().missing; }

CublasLtPlan* cublaslt_plan(const GemmArgs& g) {
  Library& l = library();
  l.get();
  auto p = std::make_unique<CublasLtPlan>();
  l.check(l.cublasLtMatmulDescCreate(&p->desc, CUBLAS_COMPUTE_32F, CUDA_R_32F),
          "cublasLtMatmulDescCreate");
  p->set(CUBLASLT_MATMUL_DESC_TRANSA, g.trans_b ? CUBLAS_OP_T : CUBLAS_OP_N);
  p->set(CUBLASLT_MATMUL_DESC_TRANSB, g.trans_a ? CUBLAS_OP_T : CUBLAS_OP_N);
  const auto layout = [&](cublasLtMatrixLayout_t* to, spec::DType t, int64_t rows, int64_t cols,
                          int64_t ld) {  // column-major
    l.check(l.cublasLtMatrixLayoutCreate(to, type_of(t), static_cast<uint64_t>(rows),
                                         static_cast<uint64_t>(cols), ld),
            "cublasLtMatrixLayoutCreate");
  };
  layout(&p->a, g.ab_type, g.trans_b ? g.K : g.N, g.trans_b ? g.N : g.K, g.ldb);
  layout(&p->b, g.ab_type, g.trans_a ? g.M : g.K, g.trans_a ? g.K : g.M, g.lda);
  layout(&p->c, g.c_type, g.N, g.M, g.ldc);
  choose(*p);
  return p.release();
}

CublasLtPlan* cublaslt_plan(const spec::Fp8GemmArgs& f) {
  Library& l = library();
  l.get();
  auto p = std::make_unique<CublasLtPlan>();
  l.check(l.cublasLtMatmulDescCreate(&p->desc, CUBLAS_COMPUTE_32F, CUDA_R_32F),
          "cublasLtMatmulDescCreate");
  p->set(CUBLASLT_MATMUL_DESC_TRANSA, CUBLAS_OP_T);
  p->set(CUBLASLT_MATMUL_DESC_TRANSB, CUBLAS_OP_N);
  p->set(CUBLASLT_MATMUL_DESC_A_SCALE_MODE,
         static_cast<int32_t>(CUBLASLT_MATMUL_MATRIX_SCALE_BLK128x128_32F));
  p->set(CUBLASLT_MATMUL_DESC_B_SCALE_MODE,
         static_cast<int32_t>(CUBLASLT_MATMUL_MATRIX_SCALE_VEC128_32F));
  const auto k = static_cast<uint64_t>(f.k), m = static_cast<uint64_t>(f.m),
             n = static_cast<uint64_t>(f.n);
  l.check(l.cublasLtMatrixLayoutCreate(&p->a, CUDA_R_8F_E4M3, k, n, f.k), "layout of B");
  l.check(l.cublasLtMatrixLayoutCreate(&p->b, CUDA_R_8F_E4M3, k, m, f.k), "layout of A");
  l.check(l.cublasLtMatrixLayoutCreate(&p->c, type_of(f.c_type), n, m, f.n), "layout of C");
  choose(*p);
  return p.release();
}

void cublaslt_free(CublasLtPlan* plan) { delete plan; }

void gemm_cuda_cublaslt(const GemmArgs& g, const CublasLtPlan& plan, void* scratch,
                        CudaStream stream) {
  run(plan, g.a, g.b, g.c, g.accumulate ? 1.0f : 0.0f, scratch, stream);
}

void fp8_gemm_cuda_cublaslt(const spec::Fp8GemmArgs& f, const CublasLtPlan& plan, void* scratch,
                            CudaStream stream) {
  char* sa = static_cast<char*>(scratch) + kCublasLtScratchBytes;
  const int64_t kb = spec::fp8_blocks(f.k);
  // [m, kb] -> [kb, m]: a column of scales a copy.
  for (int64_t b = 0; b < kb; ++b)
    if (cudaMemcpy2DAsync(sa + b * f.m * 4, 4, f.sa + b, static_cast<size_t>(kb) * 4, 4,
                          static_cast<size_t>(f.m), cudaMemcpyDeviceToDevice,
                          stream) != cudaSuccess)
      throw Error(ExitCode::usage, "copy of the scales failed", "cuBLASLt FP8 product");
  auto& p = const_cast<CublasLtPlan&>(plan);
  p.set(CUBLASLT_MATMUL_DESC_A_SCALE_POINTER, static_cast<const void*>(f.sb));
  p.set(CUBLASLT_MATMUL_DESC_B_SCALE_POINTER, static_cast<const void*>(sa));
  run(plan, f.qa, f.qb, f.c, 0.0f, scratch, stream);
}

}  // namespace v3b::kern
#endif
