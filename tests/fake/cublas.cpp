// The part of cuBLASLt and cuBLAS that kernels/**/*.cuda_cublas*.cpp call, computed plainly on the host after NVIDIA's manual
// (3.1.4.5 scale layouts, 2.8.15 grouped products), for tests/test_cuda_libraries.cpp. Both libraries in one file.
#include <cublasLt.h>
#include <cublas_api.h>

#include <cstring>

#include "reference/spec/dtype.h"

namespace {

using namespace v3b;

constexpr uint64_t kAlgo = 0xa190;
struct Desc {
  cublasOperation_t ta = CUBLAS_OP_N, tb = CUBLAS_OP_N;
  int32_t a_mode = CUBLASLT_MATMUL_MATRIX_SCALE_SCALAR_32F,
          b_mode = CUBLASLT_MATMUL_MATRIX_SCALE_SCALAR_32F;
  const float *a_scale = nullptr, *b_scale = nullptr;
};
struct Matrix {  // column-major
  cudaDataType_t type;
  int64_t rows, cols, ld, stride = 0;
  int32_t count = 1;
};
struct Preference {
  size_t bytes = 0;
  uint32_t reductions = ~0u;
};
struct Library {
  cudaStream_t stream = nullptr;
  void* workspace = nullptr;
};

double value(const void* p, cudaDataType_t t, int64_t i) {
  if (t == CUDA_R_16BF) return spec::to_float(static_cast<const spec::bf16*>(p)[i]);
  if (t == CUDA_R_8F_E4M3) return spec::to_float(static_cast<const spec::f8e4m3*>(p)[i]);
  return static_cast<const float*>(p)[i];
}
void store(void* p, cudaDataType_t t, int64_t i, double v) {
  if (t == CUDA_R_16BF)
    static_cast<spec::bf16*>(p)[i] = spec::to_bf16(static_cast<float>(v));
  else
    static_cast<float*>(p)[i] = static_cast<float>(v);
}
int64_t blocks(int64_t n) { return (n + 127) / 128; }
// C [m, n] = alpha op(A) op(B) + beta C; scales null: none.
void product(int64_t m, int64_t n, int64_t k, double alpha, bool ta, const void* a,
             cudaDataType_t at, int64_t lda, bool tb, const void* b, cudaDataType_t bt, int64_t ldb,
             double beta, void* c, cudaDataType_t ct, int64_t ldc, const float* block_scales,
             const float* vector_scales) {
  const int64_t stride = (blocks(k) + 3) / 4 * 4;
  for (int64_t j = 0; j < n; ++j)
    for (int64_t i = 0; i < m; ++i) {
      double sum = 0;
      for (int64_t l = 0; l < k; ++l) {
        double v = value(a, at, ta ? l + i * lda : i + l * lda) *
                   value(b, bt, tb ? j + l * ldb : l + j * ldb);
        if (block_scales != nullptr)
          v *= static_cast<double>(block_scales[l / 128 + i / 128 * stride]) *
               static_cast<double>(vector_scales[j + l / 128 * n]);
        sum += v;
      }
      sum *= alpha;
      if (beta != 0) sum += beta * value(c, ct, i + j * ldc);
      store(c, ct, i + j * ldc, sum);
    }
}
bool aligned(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

}  // namespace

extern "C" {
cublasStatus_t cublasLtCreate(cublasLtHandle_t* h) {
  *h = reinterpret_cast<cublasLtHandle_t>(new Library);
  return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasLtMatmulDescCreate(cublasLtMatmulDesc_t* d, cublasComputeType_t compute,
                                        cudaDataType_t scale) {
  if (compute != CUBLAS_COMPUTE_32F || scale != CUDA_R_32F) return CUBLAS_STATUS_NOT_SUPPORTED;
  *d = reinterpret_cast<cublasLtMatmulDesc_t>(new Desc);
  return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasLtMatmulDescDestroy(cublasLtMatmulDesc_t d) {
  delete reinterpret_cast<Desc*>(d);
  return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasLtMatmulDescSetAttribute(cublasLtMatmulDesc_t handle,
                                              cublasLtMatmulDescAttributes_t what, const void* v,
                                              size_t bytes) {
  auto* d = reinterpret_cast<Desc*>(handle);
  const auto take = [&](auto& to) {
    if (bytes != sizeof to) return CUBLAS_STATUS_INVALID_VALUE;
    std::memcpy(&to, v, bytes);
    return CUBLAS_STATUS_SUCCESS;
  };
  switch (what) {
    case CUBLASLT_MATMUL_DESC_TRANSA:
      return take(d->ta);
    case CUBLASLT_MATMUL_DESC_TRANSB:
      return take(d->tb);
    case CUBLASLT_MATMUL_DESC_A_SCALE_MODE:
      return take(d->a_mode);
    case CUBLASLT_MATMUL_DESC_B_SCALE_MODE:
      return take(d->b_mode);
    case CUBLASLT_MATMUL_DESC_A_SCALE_POINTER:
      return take(d->a_scale);
    case CUBLASLT_MATMUL_DESC_B_SCALE_POINTER:
      return take(d->b_scale);
    default:
      return CUBLAS_STATUS_INVALID_VALUE;
  }
}
cublasStatus_t cublasLtMatrixLayoutCreate(cublasLtMatrixLayout_t* m, cudaDataType type,
                                          uint64_t rows, uint64_t cols, int64_t ld) {
  *m = reinterpret_cast<cublasLtMatrixLayout_t>(
      new Matrix{type, static_cast<int64_t>(rows), static_cast<int64_t>(cols), ld});
  return ld >= static_cast<int64_t>(rows) ? CUBLAS_STATUS_SUCCESS : CUBLAS_STATUS_INVALID_VALUE;
}
cublasStatus_t cublasLtMatrixLayoutSetAttribute(cublasLtMatrixLayout_t handle,
                                                cublasLtMatrixLayoutAttribute_t what, const void* v,
                                                size_t bytes) {
  auto* m = reinterpret_cast<Matrix*>(handle);
  if (what == CUBLASLT_MATRIX_LAYOUT_BATCH_COUNT && bytes == sizeof m->count)
    std::memcpy(&m->count, v, bytes);
  else if (what == CUBLASLT_MATRIX_LAYOUT_STRIDED_BATCH_OFFSET && bytes == sizeof m->stride)
    std::memcpy(&m->stride, v, bytes);
  else
    return CUBLAS_STATUS_INVALID_VALUE;
  return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasLtMatrixLayoutDestroy(cublasLtMatrixLayout_t m) {
  delete reinterpret_cast<Matrix*>(m);
  return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasLtMatmulPreferenceCreate(cublasLtMatmulPreference_t* p) {
  *p = reinterpret_cast<cublasLtMatmulPreference_t>(new Preference);
  return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasLtMatmulPreferenceDestroy(cublasLtMatmulPreference_t p) {
  delete reinterpret_cast<Preference*>(p);
  return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasLtMatmulPreferenceSetAttribute(cublasLtMatmulPreference_t handle,
                                                    cublasLtMatmulPreferenceAttributes_t what,
                                                    const void* v, size_t bytes) {
  auto* p = reinterpret_cast<Preference*>(handle);
  if (what == CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES && bytes == sizeof p->bytes)
    std::memcpy(&p->bytes, v, bytes);
  else if (what == CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK && bytes == sizeof p->reductions)
    std::memcpy(&p->reductions, v, bytes);
  else
    return CUBLAS_STATUS_INVALID_VALUE;
  return CUBLAS_STATUS_SUCCESS;
}
// Refuses what the manual refuses, and k = 13, so that a refusal can be tested.
cublasStatus_t cublasLtMatmulAlgoGetHeuristic(cublasLtHandle_t, cublasLtMatmulDesc_t desc,
                                              cublasLtMatrixLayout_t la, cublasLtMatrixLayout_t lb,
                                              cublasLtMatrixLayout_t lc, cublasLtMatrixLayout_t,
                                              cublasLtMatmulPreference_t preference, int,
                                              cublasLtMatmulHeuristicResult_t* result, int* found) {
  const auto* d = reinterpret_cast<Desc*>(desc);
  const auto *a = reinterpret_cast<Matrix*>(la), *b = reinterpret_cast<Matrix*>(lb),
             *c = reinterpret_cast<Matrix*>(lc);
  const auto* p = reinterpret_cast<Preference*>(preference);
  const int64_t m = d->ta == CUBLAS_OP_T ? a->cols : a->rows,
                k = d->ta == CUBLAS_OP_T ? a->rows : a->cols,
                n = d->tb == CUBLAS_OP_T ? b->rows : b->cols;
  *found = 0;
  if (k == 13 || c->rows != m || c->cols != n || (d->tb == CUBLAS_OP_T ? b->cols : b->rows) != k ||
      p->reductions != CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE)
    return CUBLAS_STATUS_NOT_SUPPORTED;
  if (a->type == CUDA_R_8F_E4M3 &&
      (d->ta != CUBLAS_OP_T || d->tb != CUBLAS_OP_N || m % 4 != 0 || n % 4 != 0 || k % 16 != 0 ||
       d->a_scale == nullptr || d->b_scale == nullptr ||
       d->a_mode != CUBLASLT_MATMUL_MATRIX_SCALE_BLK128x128_32F ||
       d->b_mode != CUBLASLT_MATMUL_MATRIX_SCALE_VEC128_32F))
    return CUBLAS_STATUS_NOT_SUPPORTED;
  *found = 1;
  result->algo.data[0] = kAlgo;
  result->state = CUBLAS_STATUS_SUCCESS;
  return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasLtMatmul(cublasLtHandle_t, cublasLtMatmulDesc_t desc, const void* alpha,
                              const void* a, cublasLtMatrixLayout_t la, const void* b,
                              cublasLtMatrixLayout_t lb, const void* beta, const void* c,
                              cublasLtMatrixLayout_t lc, void* to, cublasLtMatrixLayout_t,
                              const cublasLtMatmulAlgo_t* algo, void* workspace, size_t bytes,
                              cudaStream_t) {
  const auto* d = reinterpret_cast<Desc*>(desc);
  const auto *x = reinterpret_cast<Matrix*>(la), *y = reinterpret_cast<Matrix*>(lb),
             *z = reinterpret_cast<Matrix*>(lc);
  const bool fp8 = x->type == CUDA_R_8F_E4M3;
  if (algo == nullptr || algo->data[0] != kAlgo || c != to || !aligned(workspace) ||
      (fp8 && (!aligned(d->a_scale) || !aligned(d->b_scale))))
    return CUBLAS_STATUS_INVALID_VALUE;
  std::memset(workspace, 0x7f, bytes);  // it is the library's
  if (x->count != y->count || x->count != z->count) return CUBLAS_STATUS_INVALID_VALUE;
  const auto at = [](const void* p, const Matrix* m, int i) {
    const int64_t e = m->type == CUDA_R_32F ? 4 : m->type == CUDA_R_16BF ? 2 : 1;
    return const_cast<char*>(static_cast<const char*>(p)) + i * m->stride * e;
  };
  for (int i = 0; i < z->count; ++i)
    product(z->rows, z->cols, d->ta == CUBLAS_OP_T ? x->rows : x->cols,
            *static_cast<const float*>(alpha), d->ta == CUBLAS_OP_T, at(a, x, i), x->type, x->ld,
            d->tb == CUBLAS_OP_T, at(b, y, i), y->type, y->ld, *static_cast<const float*>(beta),
            at(to, z, i), z->type, z->ld, fp8 ? d->a_scale : nullptr, fp8 ? d->b_scale : nullptr);
  return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasCreate_v2(cublasHandle_t* h) {
  *h = reinterpret_cast<cublasHandle_t>(new Library);
  return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasSetStream_v2(cublasHandle_t h, cudaStream_t s) {
  reinterpret_cast<Library*>(h)->stream = s;
  return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasSetWorkspace_v2(cublasHandle_t h, void* p, size_t bytes) {
  reinterpret_cast<Library*>(h)->workspace = p;
  std::memset(p, 0x7f, bytes);
  return reinterpret_cast<uintptr_t>(p) % 256 == 0 ? CUBLAS_STATUS_SUCCESS
                                                   : CUBLAS_STATUS_INVALID_VALUE;
}
cublasStatus_t cublasGemmGroupedBatchedEx(cublasHandle_t, const cublasOperation_t ta[],
                                          const cublasOperation_t tb[], const int m[],
                                          const int n[], const int k[], const void* alpha,
                                          const void* const a[], cudaDataType_t at, const int lda[],
                                          const void* const b[], cudaDataType_t bt, const int ldb[],
                                          const void* beta, void* const c[], cudaDataType_t ct,
                                          const int ldc[], int groups, const int sizes[],
                                          cublasComputeType_t compute) {
  if (compute != CUBLAS_COMPUTE_32F || at != bt || at != ct) return CUBLAS_STATUS_NOT_SUPPORTED;
  int64_t at_product = 0;
  for (int g = 0; g < groups; ++g)
    for (int i = 0; i < sizes[g]; ++i, ++at_product) {
      const bool strict = at == CUDA_R_16BF && k[g] * 2 % 16 == 0;
      if (m[g] < 0 || n[g] < 0 || lda[g] < (ta[g] == CUBLAS_OP_T ? k[g] : m[g]) ||
          ldb[g] < (tb[g] == CUBLAS_OP_T ? n[g] : k[g]) || ldc[g] < m[g] ||
          (strict && !(aligned(a[at_product]) && aligned(b[at_product]) && aligned(c[at_product]))))
        return CUBLAS_STATUS_INVALID_VALUE;
      product(m[g], n[g], k[g], static_cast<const float*>(alpha)[g], ta[g] == CUBLAS_OP_T,
              a[at_product], at, lda[g], tb[g] == CUBLAS_OP_T, b[at_product], bt, ldb[g],
              static_cast<const float*>(beta)[g], c[at_product], ct, ldc[g], nullptr, nullptr);
    }
  return CUBLAS_STATUS_SUCCESS;
}
}
