// Dense matrix products of the CPU backend at the levels AVX2, AVX-512, AVX512_BF16 and AMX (kernels/core/cpu.h), and
// oneDNN as their baseline. SPEC 0.1: weights are [out, in], y = x W^T.
#pragma once
#include <cstdint>
#include <string>

#include "reference/spec/dtype.h"

namespace v3b::kern {

// C[M,N] (+)= op(A)[M,K] * op(B)[K,N], row-major with leading strides in elements.
//   trans_a: A is stored [K,M]; trans_b: B is stored [N,K] (a weight matrix [out,in] is trans_b = true).
//   a_type == b_type in {f32, bf16}; c_type f32 or bf16; accumulation in fp32; accumulate needs c_type f32.
// Any M, N, K >= 0 (K == 0 writes zeros, or nothing when accumulating). Operands must not overlap C. C's pad
// columns (ldc > N) stay untouched. Uses all OpenMP threads; may be called inside a parallel region only with
// threads == 1 semantics of the caller (nested parallelism is off).
struct GemmArgs {
  int64_t M = 0, N = 0, K = 0;
  const void* a = nullptr;
  int64_t lda = 0;
  bool trans_a = false;
  const void* b = nullptr;
  int64_t ldb = 0;
  bool trans_b = true;
  void* c = nullptr;
  int64_t ldc = 0;
  spec::DType ab_type = spec::DType::bf16;
  spec::DType c_type = spec::DType::f32;
  bool accumulate = false;
};
void gemm(const GemmArgs& g) noexcept;
// Same for `count` independent problems of equal shape at element strides (batched matmul, e.g. heads).
void gemm_batched(const GemmArgs& g, int64_t count, int64_t stride_a, int64_t stride_b,
                  int64_t stride_c) noexcept;
std::string gemm_isa(const GemmArgs& g);  // what gemm() dispatches to for this problem here

// The same through oneDNN: the baseline's form, operands as they lie. It chooses its level once a process.
void gemm_onednn(const GemmArgs& g) noexcept;
void gemm_batched_onednn(const GemmArgs& g, int64_t count, int64_t stride_a, int64_t stride_b,
                         int64_t stride_c) noexcept;
// A linear layer (trans_b, not trans_a, not accumulating) as a user of oneDNN would run it: the weight reordered once
// into the layout that the library asks for, a second copy.
class OnednnLinear {
 public:
  explicit OnednnLinear(const GemmArgs& g);
  ~OnednnLinear();
  OnednnLinear(const OnednnLinear&) = delete;
  OnednnLinear& operator=(const OnednnLinear&) = delete;
  void run() noexcept;                                             // into g.c, from g.a
  static bool supported(spec::DType ab_type, spec::DType c_type);  // at this process's level

 private:
  struct Impl;
  Impl* impl_;
};
std::string gemm_onednn_isa();  // "oneDNN:avx512_core_bf16", what oneDNN dispatches to here
// M varies from call to call in expert layers; shapes are bucketed inside, so a varying M builds few primitives.

// Row-wise conversions, OpenMP and SIMD: n elements.
void convert_f32_to_bf16(const float* src, spec::bf16* dst, int64_t n) noexcept;
void convert_bf16_to_f32(const spec::bf16* src, float* dst, int64_t n) noexcept;
void convert_row_f32_to_bf16(const float* src, spec::bf16* dst, int64_t n) noexcept;  // one thread

}  // namespace v3b::kern
