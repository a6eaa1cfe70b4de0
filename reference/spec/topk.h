// Top-k selection and its backward (SPEC 1.24). Ties: larger first, then lower index (SPEC 0.1).
// With y_i = s_i for the selected i and 0 else: exact gradient ds_i = dy_i for the selected, 0
// else; straight-through (ste) ds_i = dy_i for all i.
#pragma once
#include "reference/spec/dtype.h"
#include "reference/spec/glossary.h"

namespace v3b::spec {

struct TopkBackwardShape {
  int64_t T = 4096, E = 256, K = 8;
  bool ste = false;
  template <class S, class V>
  static void visit(S& s, V&& v) {
    v("T", s.T);
    v("E", s.E);
    v("K", s.K);
    v("ste", s.ste);
  }
};

struct TopkBackwardArgs {
  int64_t T, E, K;
  bool ste;
  const int32_t* idx;  // [T, K] distinct, 0..E-1
  const float* dy;     // [T, E]
  float* ds;           // [T, E] overwritten
};

}  // namespace v3b::spec
