// FP8 E4M3 quantisation (SPEC 1.22). Activations: one scale a row and 128 columns, a = max(max|x|,
// 1e-4), s = a/448 (fp32) or the next power of two (ue8m0). Weights: one scale a 128x128 block, s =
// max|block|/448 (an all-zero block has s = 1). Codes q = rnd(x/s), dequantised q*s. Ragged last
// blocks are allowed.
#pragma once
#include "reference/spec/dtype.h"
#include "reference/spec/flags.h"
#include "reference/spec/glossary.h"

namespace v3b::spec {

inline constexpr int64_t kFp8Block = 128;
V3B_HD constexpr int64_t fp8_blocks(int64_t n) { return (n + kFp8Block - 1) / kFp8Block; }

struct Fp8QuantShape {
  int64_t rows = 512, cols = 7168;
  bool weight = false;                  // 128x128 blocks instead of 1x128
  ActScale act_scale = ActScale::fp32;  // activations only
  DType dtype = DType::bf16;            // of x
  template <class S, class V>
  static void visit(S& s, V&& v) {
    v("rows", s.rows);
    v("cols", s.cols);
    v("weight", s.weight);
    v("act_scale", s.act_scale);
    v("dtype", s.dtype);
  }
};

struct Fp8QuantArgs {
  int64_t rows, cols;
  bool weight;
  ActScale act_scale;
  DType dtype;    // bf16 or f32
  const void* x;  // [rows, cols]
  f8e4m3* codes;  // [rows, cols]
  float* scales;  // activations [rows, ceil(cols/128)]; weights [ceil(rows/128), ceil(cols/128)]
};

}  // namespace v3b::spec
