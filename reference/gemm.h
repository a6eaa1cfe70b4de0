// Plain dense product (SPEC 0.1), Eigen, float and double.
#pragma once
#include <cstdint>

namespace v3b::ref {

// C[M,N] (+)= op(A)[M,K] op(B)[K,N], row-major, leading strides in elements. trans_a: A stored
// [K,M]; trans_b: B stored [N,K] (a weight [out,in]).
template <class S>
void gemm(int64_t M, int64_t N, int64_t K, const S* a, int64_t lda, bool trans_a, const S* b,
          int64_t ldb, bool trans_b, S* c, int64_t ldc, bool accumulate = false);

// y[T,out] = x[T,in] w[out,in]^T, all dense.
template <class S>
void linear(int64_t T, int64_t in, int64_t out, const S* x, const S* w, S* y) {
  gemm<S>(T, out, in, x, in, false, w, in, true, y, out);
}

}  // namespace v3b::ref
