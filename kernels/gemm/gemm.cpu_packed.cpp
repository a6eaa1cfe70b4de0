// A linear layer on a packed weight: rows of activations are broadcast against groups of 16 outputs, so few rows need no
// sum across lanes and every line of the weight is read once, in one linear stream a group (packed_linear.h).
#include "kernels/gemm/packed_ops.h"

namespace v3b::kern {

PackedMatrix gemm_pack(const GemmArgs& g) {
  PackSource s;
  s.type = g.ab_type, s.w = g.b, s.ld = g.ldb, s.n = g.N, s.k = g.K;
  return PackedMatrix(s);
}

void gemm_cpu_packed(const GemmArgs& g, const PackedWeight& w) noexcept {
  RowsSource x;
  x.type = g.ab_type, x.x = g.a, x.ld = g.lda, x.m = g.M, x.k = g.K;
  packed_linear(w, x, {g.c, g.ldc, g.c_type, g.accumulate});
}

}  // namespace v3b::kern
