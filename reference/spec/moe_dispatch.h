// Token rows out to expert order and back (SPEC 1.14): counts, stable permutation, gather; weighted
// combine.
#pragma once
#include "reference/spec/dtype.h"
#include "reference/spec/glossary.h"

namespace v3b::spec {

struct MoeDispatchShape {  // also of moe_combine; uniform routes
  int64_t T = 512, d = 7168, E = 256, K = 8;
  DType dtype = DType::bf16;  // of the rows
  template <class S, class V>
  static void visit(S& s, V&& v) {
    v("T", s.T);
    v("d", s.d);
    v("E", s.E);
    v("K", s.K);
    v("dtype", s.dtype);
  }
};

struct MoeDispatchArgs {
  int64_t T, d, E, K;
  DType dtype;
  const void* x;       // [T, d]
  const int32_t* idx;  // [T, K]; < 0: unused slot
  int64_t* offsets;    // [E+1]: rows of expert e are offsets[e] .. offsets[e+1]
  int64_t* row;        // [T, K]: where the copy went, -1 for unused slots
  void* rows;          // [offsets[E], d], sorted by expert, stable in t*K+k
};

struct MoeCombineArgs {
  int64_t T, d, K;
  DType dtype;
  const void* rows;     // [any, d]
  const int64_t* row;   // [T, K]: row of a slot, -1 for unused slots
  const float* weight;  // [T, K]
  void* y;              // [T, d] = sum over k ascending in fp32, one rounding
};

}  // namespace v3b::spec
