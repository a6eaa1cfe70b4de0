// Dense products (SPEC 0.1): C[m,n] (+)= op(A)[m,k] op(B)[k,n]; a weight [out, in] is trans_b.
#pragma once
#include "reference/spec/dtype.h"
#include "reference/spec/glossary.h"

namespace v3b::spec {

struct GemmShape {
  int64_t m = 128, n = 7168, k = 2048;
  bool trans_a = false;     // A stored [k, m] (weight gradients)
  bool trans_b = true;      // B stored [n, k] (a linear layer)
  bool accumulate = false;  // C += ...; c_type f32
  DType c_type = DType::f32;
  DType dtype = DType::bf16;  // of A and B; products are summed in fp32
  template <class S, class V>
  static void visit(S& s, V&& v) {
    v("m", s.m);
    v("n", s.n);
    v("k", s.k);
    v("trans_a", s.trans_a);
    v("trans_b", s.trans_b);
    v("accumulate", s.accumulate);
    v("c_type", s.c_type);
    v("dtype", s.dtype);
  }
};

}  // namespace v3b::spec
