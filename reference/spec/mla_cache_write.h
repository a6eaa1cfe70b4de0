// T rows into the paged latent cache, as they are or as 8-bit records (SPEC 1.9).
#pragma once
#include "reference/spec/attention.h"

namespace v3b::spec {
struct MlaCacheWriteShape {
  int64_t T = 512, d_c = 512, d_r = 64, page = 64;
  KvFormat kv_format = KvFormat::bf16;
  bool rope = false;  // k_pe comes before its rotation (SPEC 1.3, interleaved pairs)
  DType dtype = DType::bf16;
  template <class S, class V>
  static void visit(S& s, V&& v) {
    v("T", s.T), v("d_c", s.d_c), v("d_r", s.d_r), v("page", s.page), v("kv_format", s.kv_format);
    v("rope", s.rope), v("dtype", s.dtype);
  }
};
}  // namespace v3b::spec
