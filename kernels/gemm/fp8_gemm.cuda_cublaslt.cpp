// Block-scaled FP8 product (SPEC 1.23) through cuBLASLt. What NVIDIA documents (cuBLAS manual 3.1.4, "Narrow Precision Data
// Types Usage", 3.1.4.5 "128-element 1D and 128x128 2D Block Scaling For FP8 Data Types"; enum cublasLtMatmulMatrixScale_t
// of cublasLt.h 13.1, values 4 and 5):
//   - CUBLASLT_MATMUL_MATRIX_SCALE_VEC128_32F and _BLK128x128_32F: fp32 scales of 128 elements along k, of 128x128 blocks.
//   - Compute capability 9.0 only, cuBLAS 12.9 or later (the manual's support table; NVIDIA's answers in CUDALibrarySamples
//     issues 270 and 310). 10.x has 32-element UE8M0 scales instead, another format; 8.9 one scale a tensor.
//   - Pairs: VEC128 x VEC128, VEC128 x BLK128x128 and the reverse; BLK128x128 for both is not supported.
//   - D bf16, fp16 or fp32; A transposed, B not (the FP8 rule of cublasLtMatmul on 9.0). M and N multiples of 4.
//   - Layouts: scales start 16-byte aligned. VEC128 of B: N-major, [ceil(k/128)][N]. BLK128x128 of A: K-major with the
//     stride between columns rounded up to 4, [ceil(M/128)][L4], L4 = ceil(k/128) rounded up to a multiple of 4 (a
//     framework without this rounding got silently wrong products, pytorch pull request 166752).
// The library's A is our weight, its B our activations. Our scales are [m][ceil(k/128)] and [ceil(n/128)][ceil(k/128)]: the
// first are transposed in every call (fp8_scales_cuda_simt), the second copied only where ceil(k/128) is no multiple of 4.
// Rows that are no multiple of 4 are computed in a padded copy, also part of the call.
#if defined(V3B_HAVE_CUBLASLT)
#include "kernels/gemm/cublaslt_plan.h"
#include "kernels/gemm/fp8_scales_cuda.h"

namespace v3b::kern {
namespace {

int64_t up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }
struct Layout {  // of the scratch behind the library's own; -1: not needed
  int64_t rows, sa, sb, codes, out, bytes;
};
Layout layout_of(const spec::Fp8GemmArgs& f) {
  const int64_t kb = spec::fp8_blocks(f.k);
  Layout l{up(f.m, 4), 0, -1, -1, -1, kCublasLtScratchBytes};
  const auto take = [&](int64_t bytes) {
    const int64_t at = l.bytes;
    l.bytes += up(bytes, 256);
    return at;
  };
  l.sa = take(kb * l.rows * 4);
  if (kb % 4 != 0) l.sb = take(spec::fp8_blocks(f.n) * up(kb, 4) * 4);
  if (l.rows != f.m) l.codes = take(l.rows * f.k);
  if (l.rows != f.m) l.out = take(l.rows * f.n * spec::dtype_bytes(f.c_type));
  return l;
}
std::unique_ptr<CublasLtPlan> plan(const spec::Fp8GemmArgs& f, bool& found) {
  cublaslt().get();
  auto p = std::make_unique<CublasLtPlan>();
  p->set(CUBLASLT_MATMUL_DESC_TRANSA, CUBLAS_OP_T);
  p->set(CUBLASLT_MATMUL_DESC_TRANSB, CUBLAS_OP_N);
  p->set(CUBLASLT_MATMUL_DESC_A_SCALE_MODE,
         static_cast<int32_t>(CUBLASLT_MATMUL_MATRIX_SCALE_BLK128x128_32F));
  p->set(CUBLASLT_MATMUL_DESC_B_SCALE_MODE,
         static_cast<int32_t>(CUBLASLT_MATMUL_MATRIX_SCALE_VEC128_32F));
  const int64_t rows = layout_of(f).rows;
  p->layouts(spec::DType::f8e4m3, f.c_type, f.k, f.n, f.k, f.k, rows, f.k, f.n, rows, f.n);
  // For the heuristics: there are scales, 256-byte aligned. The call sets where.
  p->set(CUBLASLT_MATMUL_DESC_A_SCALE_POINTER, uintptr_t{256});
  p->set(CUBLASLT_MATMUL_DESC_B_SCALE_POINTER, uintptr_t{256});
  found = p->choose();
  return p;
}

}  // namespace

std::string cublaslt_refuses(const spec::Fp8GemmArgs& f) {
  if (f.k % 16 != 0 || f.n % 16 != 0) return "cuBLASLt takes FP8 with n and k multiples of 16 only";
  return refusal([&](bool& found) { plan(f, found); });
}
CublasLtPlan* cublaslt_plan(const spec::Fp8GemmArgs& f) {
  bool found = false;
  auto p = plan(f, found);
  if (!found) throw Error(ExitCode::usage, kNoAlgorithm, "cublasLtMatmulAlgoGetHeuristic");
  return p.release();
}
int64_t fp8_gemm_cublaslt_scratch_bytes(const spec::Fp8GemmArgs& f) { return layout_of(f).bytes; }
void fp8_gemm_cuda_cublaslt(const spec::Fp8GemmArgs& f, CublasLtPlan& plan, void* scratch,
                            CudaStream stream) {
  const Layout l = layout_of(f);
  char* base = static_cast<char*>(scratch);
  auto* sa = reinterpret_cast<float*>(base + l.sa);
  auto* sb = l.sb < 0 ? nullptr : reinterpret_cast<float*>(base + l.sb);
  fp8_scales_cuda_simt({f.m, l.rows, spec::fp8_blocks(f.n), spec::fp8_blocks(f.k), f.sa, sa, f.sb,
                        sb, up(spec::fp8_blocks(f.k), 4), false},
                       stream);
  const void* codes = f.qa;
  if (l.codes >=
      0) {  // the pad rows are whatever the scratch holds: a row of C needs its own row only
    cuda_copy(base + l.codes, f.qa, f.m * f.k, stream);
    codes = base + l.codes;
  }
  plan.set(CUBLASLT_MATMUL_DESC_A_SCALE_POINTER,
           static_cast<const void*>(sb == nullptr ? f.sb : sb));
  plan.set(CUBLASLT_MATMUL_DESC_B_SCALE_POINTER, static_cast<const void*>(sa));
  void* to = l.out < 0 ? f.c : base + l.out;
  plan.run(f.qb, codes, to, 0.0f, scratch, stream);
  if (l.out >= 0) cuda_copy(f.c, to, f.m * f.n * spec::dtype_bytes(f.c_type), stream);
}

}  // namespace v3b::kern
#endif
