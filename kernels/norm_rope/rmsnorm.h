// RMSNorm, optionally fused with the residual add (SPEC 1.2). FLOPs 4Td; least bytes 2Tde, with
// residual 4Tde.
#pragma once
#include "kernels/norm_rope/quant_out.h"
#include "reference/spec/rmsnorm.h"

namespace v3b::kern {
void rmsnorm_cpu_simd(
    const spec::RmsNormArgs& a) noexcept;  // Highway, OpenMP over rows; f32 and bf16
// The residual read from another place than the one that it is written to: residual = x + residual_in.
void rmsnorm_cpu_simd(const spec::RmsNormArgs& a, const void* residual_in) noexcept;
// RMSNorm, then 1x128 FP8 quantisation of y as rounded to bf16: the bits of rmsnorm followed by fp8_quant. dtype bf16; a.y
// is also written, unless null. Least bytes: T d (of codes) and the scales instead of 2Td of y.
void rmsnorm_quant_cpu_simd(const spec::RmsNormArgs& a, const void* residual_in,
                            const QuantOut& q) noexcept;
const char* rmsnorm_cpu_simd_isa() noexcept;  // the Highway target that runs here

// The same with strides and a dtype for each operand (f32 or bf16), as a forward pass with an f32
// residual stream and bf16 GEMM inputs needs it. norm_rounding=hf rounds to bf16 before the weight,
// whatever y_type is: the flag stands for a checkpoint's own code, which computes in bf16
// (reference/forward.h).
struct RmsNormMixedArgs {
  int64_t T, d;
  double eps;
  spec::NormRounding norm_rounding;
  spec::DType x_type, w_type, y_type;
  const void* x;  // [T, d] at x_stride elements
  int64_t x_stride;
  const void* w;  // [d]
  void* y;        // [T, d] at y_stride elements; may be x if types and strides agree
  int64_t y_stride;
};
void rmsnorm_mixed(const RmsNormMixedArgs& a) noexcept;
}  // namespace v3b::kern
