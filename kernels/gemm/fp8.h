// FP8 on the CPU (SPEC 1.22, 1.23): quantisation and block-scaled products. FP8 weights stay one
// byte in memory and are widened block by block in registers; codes are exact in bf16, scales are
// applied in fp32 after each 128-long segment, so the only errors are fp32 sums and the rounding of
// C.
#pragma once
#include <cstdint>
#include <string>

#include "reference/spec/fp8_gemm.h"
#include "reference/spec/fp8_quant.h"

namespace v3b::kern {

// Codes and scales equal the reference's bit by bit (true division, no reciprocal).
void fp8_quant_cpu_simd(const spec::Fp8QuantArgs& a) noexcept;
std::string fp8_quant_cpu_simd_isa(spec::DType dtype);
// What a fused kernel calls on the parts of a row of bf16 that it has just made: how, asked for once a call (level, flags),
// then 1x128 codes and scales of n values from a block's first on, by this thread. `stream`: codes past the caches where
// they begin on a line; the caller fences.
struct Fp8Values {
  const void* table;  // look-ups, or null
  spec::ActScale act_scale;
  bool stream;
};
Fp8Values fp8_values(spec::ActScale act_scale, bool stream) noexcept;
void fp8_quant_values(const Fp8Values& how, const uint16_t* bf16_bits, int64_t n,
                      spec::f8e4m3* codes, float* scales) noexcept;

// Widening: codes * scales to float or bf16 (weights: 128x128 scales). Row-major, dense.
void fp8_dequant_weight(int64_t rows, int64_t cols, const spec::f8e4m3* codes, const float* scales,
                        spec::DType out_type, void* out) noexcept;

// NaN codes give NaN. Any m, n, k >= 0. Levels AVX2, AVX-512, AVX512_BF16 (with AVX512_VBMI), AMX.
void fp8_gemm(const spec::Fp8GemmArgs& a) noexcept;
std::string fp8_gemm_isa(const spec::Fp8GemmArgs& a);  // what it dispatches to here
bool fp8_gemm_avx512bf16_supported();                  // AVX512_BF16 and AVX512_VBMI, at this level

// Baseline: wide_b [n, k] from fp8_dequant_weight, wide_a [m, k] scratch.
void fp8_gemm_cpu_onednn(const spec::Fp8GemmArgs& a, const float* wide_b, float* wide_a) noexcept;

// Columns [n0, n1) of all rows at float, dot products; af: activations as float [m, k]; wf: scratch [2, k].
void fp8_columns_cpu_simd(const spec::Fp8GemmArgs& g, const float* af, float* wf, int64_t n0,
                          int64_t n1) noexcept;

// Work pieces of the AVX-512 file (one thread each).
// A as bf16 [m, kp], kp = k rounded up to 128, zero padded.
void fp8_widen_rows_avx512bf16(const spec::f8e4m3* q, int64_t rows, int64_t k, int64_t kp,
                               spec::bf16* out) noexcept;
// Columns [n0, n1) of C for all rows; few rows.
void fp8_gemv_avx512bf16(const spec::Fp8GemmArgs& g, const spec::bf16* a, int64_t kp, int64_t n0,
                         int64_t n1) noexcept;

}  // namespace v3b::kern
