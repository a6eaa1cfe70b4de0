// Few rows of activations against FP8 weight rows in place, one thread (SPEC 1.23). AVX512_BF16 and AVX512_VBMI
// (fp8_gemm_avx512bf16_supported()). Internal to kernels; used by fp8_gemm() and the experts.
#pragma once
#include "reference/spec/dtype.h"

namespace v3b::kern {

struct Fp8Dots {
  int64_t m = 0, k = 0, kp = 0;  // rows (1 or 2), columns, columns rounded up to 128
  const spec::bf16* a =
      nullptr;  // [kp / 128][m][128] in the kernel's order: fp8_dots_order*, once a call
  const float* sa = nullptr;        // [m, kp / 128] scales of FP8 activations; null: all one
  const spec::f8e4m3* w = nullptr;  // [N, k]
  const float* sw = nullptr;        // [ceil(N / 128), kp / 128]
  void* c = nullptr;                // row i, weight row n at i * ldc + n - n_base
  int64_t ldc = 0, n_base = 0;
  spec::DType c_type = spec::DType::f32;  // or bf16
  float* scratch = nullptr;               // [m * kp / 128] of this thread
};
// Weight rows [n0, n1).
void fp8_dots_cpu_avx512bf16(const Fp8Dots& d, int64_t n0, int64_t n1) noexcept;
void fp8_dots_order_codes_cpu_avx512bf16(const spec::f8e4m3* q, int64_t m, int64_t k, int64_t kp,
                                         spec::bf16* out) noexcept;
void fp8_dots_order_cpu_avx512bf16(const spec::bf16* x, int64_t ld, int64_t m, int64_t k,
                                   int64_t kp, spec::bf16* out) noexcept;
inline constexpr int64_t kFp8DotsRows = 2;

}  // namespace v3b::kern
