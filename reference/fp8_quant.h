// Plain FP8 E4M3 quantisation (SPEC 1.22), float and double.
#pragma once
#include <cstdint>

#include "reference/spec/dtype.h"
#include "reference/spec/flags.h"
#include "reference/spec/fp8_quant.h"

namespace v3b::ref {

// The stored scale of a group whose largest magnitude is amax (clamp 1e-4 included), fp32.
float fp8_act_scale(float amax, spec::ActScale kind);
// Weights: amax/448, 1 for an all-zero block.
float fp8_weight_scale(float amax);

// x [rows, cols] -> codes [rows, cols], scales [rows, ceil(cols/128)] (1x128).
template <class S>
void fp8_quantize_act(int64_t rows, int64_t cols, const S* x, spec::f8e4m3* codes, float* scales,
                      spec::ActScale kind = spec::ActScale::fp32);
// w [rows, cols] -> codes, scales [ceil(rows/128), ceil(cols/128)] (128x128, ragged ends).
template <class S>
void fp8_quantize_weight(int64_t rows, int64_t cols, const S* w, spec::f8e4m3* codes,
                         float* scales);
// One scale for everything: the baseline of the outlier scenario. Returns the scale.
template <class S>
float fp8_quantize_tensor(int64_t n, const S* x, spec::f8e4m3* codes);

// q * s back to S.
template <class S>
void fp8_dequantize_act(int64_t rows, int64_t cols, const spec::f8e4m3* codes, const float* scales,
                        S* x);
template <class S>
void fp8_dequantize_weight(int64_t rows, int64_t cols, const spec::f8e4m3* codes,
                           const float* scales, S* w);

}  // namespace v3b::ref
