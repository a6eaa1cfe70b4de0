// Small bf16 matrix products on one thread for the attention core, where a library call costs more
// than the product. Operands are pairs along K: one uint32 holds elements 2k (low half) and 2k+1.
// Internal to kernels/train.
#pragma once
#include <cstdint>

namespace v3b::kern::train {

// C[M,N] (+)= A B, fp32 accumulation. a(m, kp) at a[m*a_row + kp*a_pair]; b(kp, n) at b[kp*ldb +
// n]; N % 16 == 0, M % 8 == 0, K2 = K/2 pairs. Needs AVX512_BF16 (cpu_features().avx512_bf16).
void small_gemm_cpu_avx512bf16(int64_t M, int64_t N, int64_t K2, const uint32_t* a, int64_t a_row,
                               int64_t a_pair, const uint32_t* b, int64_t ldb, float* c,
                               int64_t ldc, bool accumulate) noexcept;

}  // namespace v3b::kern::train
