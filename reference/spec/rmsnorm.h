// RMSNorm (SPEC 1.2): y = x * (mean_j x_j^2 + eps)^(-1/2) * w; with residual: r' = rnd(r + x), y = RMSNorm(r').
#pragma once
#include "reference/spec/dtype.h"
#include "reference/spec/flags.h"
#include "reference/spec/glossary.h"

namespace v3b::spec {

struct RmsNormShape {
  int64_t T = 1, d = 7168;
  bool residual = false;  // fused residual form
  NormRounding norm_rounding = NormRounding::single;
  bool quant = false;  // y leaves as 1x128 FP8 codes and scales (1.22), not as itself
  ActScale act_scale = ActScale::fp32;  // of these
  DType dtype = DType::bf16;            // of x, r, w, y
  template <class S, class V>
  static void visit(S& s, V&& v) {
    v("T", s.T);
    v("d", s.d);
    v("residual", s.residual);
    v("norm_rounding", s.norm_rounding);
    v("quant", s.quant);
    v("act_scale", s.act_scale);
    v("dtype", s.dtype);
  }
};

struct RmsNormArgs {
  int64_t T, d;
  double eps;
  NormRounding norm_rounding;
  DType dtype;
  const void* x;   // [T, d]
  void* residual;  // [T, d] in and out (r -> r + x), or null: no residual
  const void* w;   // [d]
  void* y;         // [T, d]
};

}  // namespace v3b::spec
