#include "reference/gemm.h"

#include <Eigen/Core>

namespace v3b::ref {

template <class S>
void gemm(int64_t M, int64_t N, int64_t K, const S* a, int64_t lda, bool trans_a, const S* b,
          int64_t ldb, bool trans_b, S* c, int64_t ldc, bool accumulate) {
  using Rows = Eigen::Matrix<S, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;
  using In = Eigen::Map<const Rows, 0, Eigen::OuterStride<>>;
  using Out = Eigen::Map<Rows, 0, Eigen::OuterStride<>>;
  const In A(a, trans_a ? K : M, trans_a ? M : K, Eigen::OuterStride<>(lda));
  const In B(b, trans_b ? N : K, trans_b ? K : N, Eigen::OuterStride<>(ldb));
  Out C(c, M, N, Eigen::OuterStride<>(ldc));
  if (!accumulate) C.setZero();
  if (K == 0) return;
  if (trans_a && trans_b) C.noalias() += A.transpose() * B.transpose();
  if (trans_a && !trans_b) C.noalias() += A.transpose() * B;
  if (!trans_a && trans_b) C.noalias() += A * B.transpose();
  if (!trans_a && !trans_b) C.noalias() += A * B;
}

template void gemm<float>(int64_t, int64_t, int64_t, const float*, int64_t, bool, const float*,
                          int64_t, bool, float*, int64_t, bool);
template void gemm<double>(int64_t, int64_t, int64_t, const double*, int64_t, bool, const double*,
                           int64_t, bool, double*, int64_t, bool);

}  // namespace v3b::ref
