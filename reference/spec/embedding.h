// Embedding gather (SPEC 1.1): out[t] = table[ids[t]]. Pure data movement, bitwise.
#pragma once
#include "reference/spec/dtype.h"
#include "reference/spec/glossary.h"

namespace v3b::spec {

struct EmbeddingShape {
  int64_t T = 512, d = 7168, V = 8192;
  DType dtype = DType::bf16;
  template <class S, class F>
  static void visit(S& s, F&& v) {
    v("T", s.T);
    v("d", s.d);
    v("V", s.V);
    v("dtype", s.dtype);
  }
};
struct EmbeddingArgs {
  int64_t T, d, V;
  DType dtype;         // any; rows are copied
  const int32_t* ids;  // [T], checked by the caller: 0 <= id < V
  const void* table;   // [V, d]
  void* y;             // [T, d]
};

}  // namespace v3b::spec
