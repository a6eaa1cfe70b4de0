// Block-scaled FP8 product (SPEC 1.23) on a packed weight: one byte an element in memory, widened in registers, the scales
// on the sums of each block of 128 of K (packed_linear.h).
#include "kernels/gemm/packed_ops.h"

namespace v3b::kern {

PackedMatrix fp8_gemm_pack(const spec::Fp8GemmArgs& a) {
  PackSource s;
  s.type = spec::DType::f8e4m3, s.w = a.qb, s.ld = a.k, s.n = a.n, s.k = a.k;
  return PackedMatrix(s, a.sb);
}

void fp8_gemm_cpu_packed(const spec::Fp8GemmArgs& a, const PackedWeight& w) noexcept {
  RowsSource x;
  x.type = spec::DType::f8e4m3, x.x = a.qa, x.ld = a.k, x.m = a.m, x.k = a.k;
  packed_linear(w, x, {a.c, a.n, a.c_type}, a.sa);
}

}  // namespace v3b::kern
