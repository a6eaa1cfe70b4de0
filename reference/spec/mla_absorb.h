// The absorbed projections of MLA decode (SPEC 1.8): a product a head, y[t,h,:] = x[t,h,:] W[h]^T. q side: x is q_nope
// (k = d_n), W[h] is W_UK[h] transposed [d_c, d_n], y the latent query (n = d_c). Output side: x is the latent output
// (k = d_c), W[h] = W_UV[h] [d_v, d_c], y the head's output (n = d_v).
#pragma once
#include "reference/spec/dtype.h"
#include "reference/spec/glossary.h"

namespace v3b::spec {

struct MlaAbsorbShape {
  int64_t T = 1, n_h = 128, n = 512, k = 128;
  DType dtype = DType::bf16;  // of x, W and y
  template <class S, class V>
  static void visit(S& s, V&& v) {
    v("T", s.T);
    v("n_h", s.n_h);
    v("n", s.n);
    v("k", s.k);
    v("dtype", s.dtype);
  }
};

struct MlaAbsorbArgs {
  int64_t T, n_h, n, k;
  DType dtype;
  const void* x;  // [T, n_h, k]
  const void* w;  // [n_h, n, k]
  void* y;        // [T, n_h, n]; sums in fp32, one rounding
};

}  // namespace v3b::spec
