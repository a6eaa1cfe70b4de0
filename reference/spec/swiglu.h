// SwiGLU activation, softmax rows and embedding gather: shapes and arguments (SPEC 1.13, 1.5, 1.1).
#pragma once
#include "reference/spec/dtype.h"
#include "reference/spec/flags.h"
#include "reference/spec/glossary.h"

namespace v3b::spec {

struct SwigluShape {
  int64_t T = 512, m = 2048;
  bool quant = false;  // y leaves as 1x128 FP8 codes and scales (1.22), not as itself
  ActScale act_scale = ActScale::fp32;  // of these
  DType dtype = DType::bf16;
  template <class S, class V>
  static void visit(S& s, V&& v) {
    v("T", s.T);
    v("m", s.m);
    v("quant", s.quant);
    v("act_scale", s.act_scale);
    v("dtype", s.dtype);
  }
};
// y = silu(gate) * up [* row_scale]; one rounding at the end, arithmetic in f32.
struct SwigluArgs {
  int64_t T, m;
  DType in_type, out_type;  // f32 or bf16
  const void* gate;         // [T, m]
  const void* up;           // [T, m]; of a fused gate|up product: gate + m with stride 2m
  int64_t in_stride;        // elements between rows of gate and of up
  const float* row_scale;   // [T] or null
  void* y;                  // [T, m]
  int64_t y_stride;
};

struct SoftmaxShape {
  int64_t T = 256, n = 129280;
  DType dtype = DType::f32;
  template <class S, class V>
  static void visit(S& s, V&& v) {
    v("T", s.T);
    v("n", s.n);
    v("dtype", s.dtype);
  }
};
// y = softmax(scale * x) by rows, lse = log sum exp(scale * x), natural log. All f32.
struct SoftmaxArgs {
  int64_t T, n;
  double scale;
  const float* x;  // [T, n] at stride
  int64_t x_stride;
  float* y;  // [T, n] at stride, may be x; or null: lse only
  int64_t y_stride;
  float* lse;  // [T] or null
};

}  // namespace v3b::spec
