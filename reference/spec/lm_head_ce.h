// Output head with cross-entropy (SPEC 1.29): z = h W^T, nll = lse(z) - z_y in fp32 from fp32 sums,
// online over chunks of the vocabulary so that logits [T, V] need not exist. Label -100 is ignored
// (nll 0).
#pragma once
#include "reference/spec/dtype.h"
#include "reference/spec/glossary.h"

namespace v3b::spec {

inline constexpr int64_t kIgnoreLabel = -100;

struct LmHeadCeShape {
  int64_t T = 128, d = 7168, V = 129280;
  DType dtype = DType::bf16;  // of h and W
  template <class S, class F>
  static void visit(S& s, F&& v) {
    v("T", s.T);
    v("d", s.d);
    v("V", s.V);
    v("dtype", s.dtype);
  }
};

struct LmHeadCeArgs {
  int64_t T, d, V;
  DType dtype;            // bf16 or f32
  const void* h;          // [T, d], after the final norm
  const void* w;          // [V, d]
  const int64_t* labels;  // [T], 0..V-1 or -100; null: no nll (decode wants argmax and lse only)
  float* nll;             // [T], or null
  float* lse;             // [T]
  int32_t* argmax;        // [T], lowest index among equals; NaN logits never win
};

}  // namespace v3b::spec
