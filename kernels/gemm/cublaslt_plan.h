// Shared by the files that call cuBLASLt: the library, opened at run time (the binary starts on machines without it, one
// reason tells why it is missing), and a planned product. Included only where V3B_HAVE_CUBLASLT is defined.
#pragma once
#include <cublasLt.h>
#include <cuda_runtime_api.h>

#include <memory>
#include <string>

#include "kernels/gemm/gemm_libs_cuda.h"
#include "model/error.h"

namespace v3b::kern {

// The functions used, by the library's own names.
#define V3B_LT_FUNCTIONS(F)               \
  F(cublasLtCreate)                       \
  F(cublasLtMatmul)                       \
  F(cublasLtMatmulDescCreate)             \
  F(cublasLtMatmulDescDestroy)            \
  F(cublasLtMatmulDescSetAttribute)       \
  F(cublasLtMatrixLayoutCreate)           \
  F(cublasLtMatrixLayoutDestroy)          \
  F(cublasLtMatrixLayoutSetAttribute)     \
  F(cublasLtMatmulPreferenceCreate)       \
  F(cublasLtMatmulPreferenceDestroy)      \
  F(cublasLtMatmulPreferenceSetAttribute) \
  F(cublasLtMatmulAlgoGetHeuristic)

struct CublasLt {
  std::string missing;  // empty: here
  cublasLtHandle_t handle = nullptr;
#define V3B_LT(f) decltype(&::f) f = nullptr;
  V3B_LT_FUNCTIONS(V3B_LT)
#undef V3B_LT
  CublasLt();
  void check(cublasStatus_t s, const char* where) const;
  cublasLtHandle_t get();  // throws v3b::Error where the library is missing
};
CublasLt& cublaslt();
// "libcublas": libcublas.so.MAJOR of the headers, from the loader's path or the toolkit's folder; null where it is not.
void* open_cublas(const char* name, std::string& missing);

struct CublasLtPlan {
  cublasLtMatmulDesc_t desc = nullptr;
  cublasLtMatrixLayout_t a = nullptr, b = nullptr, c = nullptr;
  cublasLtMatmulAlgo_t algo{};
  CublasLtPlan();  // fp32 sums, `desc` made
  CublasLtPlan(const CublasLtPlan&) = delete;
  CublasLtPlan& operator=(const CublasLtPlan&) = delete;
  ~CublasLtPlan();
  template <class T>
  void set(cublasLtMatmulDescAttributes_t what, const T& v) {
    cublaslt().check(cublaslt().cublasLtMatmulDescSetAttribute(desc, what, &v, sizeof v),
                     "cublasLtMatmulDescSetAttribute");
  }
  // Column-major layouts, sizes in elements.
  void layouts(spec::DType in, spec::DType out, int64_t a_rows, int64_t a_cols, int64_t lda,
               int64_t b_rows, int64_t b_cols, int64_t ldb, int64_t c_rows, int64_t c_cols,
               int64_t ldc);
  // The layouts are those of one of `count` products, `stride` elements apart.
  void batch(int64_t count, int64_t stride_a, int64_t stride_b, int64_t stride_c);
  bool choose();  // the heuristics' first algorithm; false: there is none
  void run(const void* lib_a, const void* lib_b, void* c, float beta, void* scratch,
           CudaStream stream) const;
};
inline constexpr const char* kNoAlgorithm = "cuBLASLt has no algorithm for this shape here";
// Why `plan`, which says whether an algorithm was found, cannot be made; empty: it can.
template <class F>
std::string refusal(F&& plan) {
  if (!cublaslt().missing.empty()) return cublaslt().missing;
  try {
    bool found = false;
    plan(found);
    return found ? "" : kNoAlgorithm;
  } catch (const Error& e) {
    return e.what();
  }
}

}  // namespace v3b::kern
