// Expanded MLA of T new tokens over s0 cached latents, the kv_b product included (SPEC 1.7).
#pragma once
#include "reference/spec/attention.h"

namespace v3b::spec {
struct MlaPrefillShape {
  int64_t T = 512, s0 = 0, n_h = 128, d_n = 128, d_r = 64, d_v = 128, d_c = 512;
  DType dtype = DType::bf16;
  template <class S, class V>
  static void visit(S& s, V&& v) {
    v("T", s.T), v("s0", s.s0), v("n_h", s.n_h), v("d_n", s.d_n), v("d_r", s.d_r), v("d_v", s.d_v),
        v("d_c", s.d_c);
    v("dtype", s.dtype);
  }
};
}  // namespace v3b::spec
