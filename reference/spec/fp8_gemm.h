// Block-scaled FP8 product (SPEC 1.23):
//   C[i,n] = sum_b sa[i,b] * sb[n/128, b] * sum_{k in block b} qa[i,k] * qb[n,k]
// The inner sum in fp32, every 128-long segment promoted with its scales. Scale order here: dot *
// (sa * sb).
#pragma once
#include "reference/spec/dtype.h"
#include "reference/spec/flags.h"
#include "reference/spec/fp8_quant.h"

namespace v3b::spec {

struct Fp8GemmShape {
  int64_t m = 128, n = 4096, k = 7168;
  ActScale act_scale = ActScale::fp32;  // how the activations of the case are quantised
  DType dtype = DType::bf16;            // of C: bf16 or f32
  template <class S, class V>
  static void visit(S& s, V&& v) {
    v("m", s.m);
    v("n", s.n);
    v("k", s.k);
    v("act_scale", s.act_scale);
    v("dtype", s.dtype);
  }
};

struct Fp8GemmArgs {
  int64_t m, n, k;
  const f8e4m3* qa;  // [m, k]
  const float* sa;   // [m, ceil(k/128)]
  const f8e4m3* qb;  // [n, k] weight
  const float* sb;   // [ceil(n/128), ceil(k/128)] weight_scale_inv
  DType c_type;      // bf16 or f32
  void* c;           // [m, n]
};

}  // namespace v3b::spec
