// One new query a sequence over a contiguous cache [B, n_kv, s, d]: MHA, GQA, MQA (SPEC 1.5).
#pragma once
#include "reference/spec/attention.h"

namespace v3b::spec {
struct AttentionDecodeShape {
  int64_t B = 1, s = 4096, min_s = -1;  // lengths fall evenly from s to min_s; -1: all s
  int64_t n_h = 32, n_kv = 8, d_qk = 128, d_v = 128;
  DType dtype = DType::bf16;
  template <class S, class V>
  static void visit(S& s, V&& v) {
    v("B", s.B), v("s", s.s), v("min_s", s.min_s), v("n_h", s.n_h), v("n_kv", s.n_kv),
        v("d_qk", s.d_qk);
    v("d_v", s.d_v), v("dtype", s.dtype);
  }
};
}  // namespace v3b::spec
