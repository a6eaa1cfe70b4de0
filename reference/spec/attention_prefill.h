// Causal attention of T new tokens over s0 cached ones: MHA, GQA, MQA (SPEC 1.5).
#pragma once
#include "reference/spec/attention.h"

namespace v3b::spec {
struct AttentionPrefillShape {
  int64_t T = 512, s0 = 0, n_h = 32, n_kv = 8, d_qk = 128, d_v = 128;
  DType dtype = DType::bf16;
  template <class S, class V>
  static void visit(S& s, V&& v) {
    v("T", s.T), v("s0", s.s0), v("n_h", s.n_h), v("n_kv", s.n_kv), v("d_qk", s.d_qk),
        v("d_v", s.d_v);
    v("dtype", s.dtype);
  }
};
}  // namespace v3b::spec
