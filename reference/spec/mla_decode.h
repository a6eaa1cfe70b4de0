// Absorbed MLA decode on the paged latent cache (SPEC 1.8, 1.9).
#pragma once
#include "reference/spec/attention.h"

namespace v3b::spec {
struct MlaDecodeShape {
  int64_t B = 1, s = 4096, min_s = -1;  // lengths fall evenly from s to min_s; -1: all s
  int64_t s_q = 1, n_h = 128, d_c = 512, d_r = 64, page = 64;
  KvFormat kv_format = KvFormat::bf16;
  EmptyLse empty_lse = EmptyLse::pos_inf;
  DType dtype = DType::bf16;
  template <class S, class V>
  static void visit(S& s, V&& v) {
    v("B", s.B), v("s", s.s), v("min_s", s.min_s), v("s_q", s.s_q), v("n_h", s.n_h),
        v("d_c", s.d_c), v("d_r", s.d_r);
    v("page", s.page), v("kv_format", s.kv_format), v("empty_lse", s.empty_lse),
        v("dtype", s.dtype);
  }
};
}  // namespace v3b::spec
