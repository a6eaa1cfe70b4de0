// One decoder layer with everything that its backward needs. Internal to model_backward.
#pragma once
#include <Eigen/Core>
#include <vector>

#include "reference/model_backward.h"
#include "reference/router.h"

namespace v3b::ref {

template <class S>
using RowMatrix = Eigen::Matrix<S, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;

template <class S>
struct LayerActs {
  RowMatrix<S> h_in, x, q_a, c_q, q, kv, c, k_pe,
      o;  // q and k_pe rotated; o before the output projection
  RowMatrix<S> h_mid, u, z;
  Routes<S> routes;
  std::vector<int64_t> load;
  double aux = 0;
};

// B sequences of T rows at positions 0..T-1. h [B*T, d] -> next residual stream.
template <class S>
RowMatrix<S> layer_forward(const model::ModelConfig& c, const LayerParams<S>& p, int64_t B,
                           int64_t T, const LossOptions& o, const RowMatrix<S>& h, LayerActs<S>& a);
// dh of the output -> dh of the input; g accumulated. Adds the gradient of the balance loss.
template <class S>
RowMatrix<S> layer_backward(const model::ModelConfig& c, const LayerParams<S>& p, int64_t B,
                            int64_t T, const LossOptions& o, const LayerActs<S>& a,
                            const RowMatrix<S>& dh, LayerParams<S>& g);

// y = x W^T; its backward adds to dw and returns dx.
template <class S>
RowMatrix<S> linear_forward(const RowMatrix<S>& x, const std::vector<S>& w, int64_t out) {
  return x * Eigen::Map<const RowMatrix<S>>(w.data(), out, x.cols()).transpose();
}
template <class S>
RowMatrix<S> linear_backward(const RowMatrix<S>& x, const std::vector<S>& w, const RowMatrix<S>& dy,
                             std::vector<S>& dw) {
  Eigen::Map<RowMatrix<S>>(dw.data(), dy.cols(), x.cols()) += dy.transpose() * x;
  return dy * Eigen::Map<const RowMatrix<S>>(w.data(), dy.cols(), x.cols());
}
template <class S>
RowMatrix<S> norm_forward(const RowMatrix<S>& x, const std::vector<S>& w, double eps);
template <class S>
RowMatrix<S> norm_backward(const RowMatrix<S>& x, const std::vector<S>& w, double eps,
                           const RowMatrix<S>& dy, std::vector<S>& dw);

}  // namespace v3b::ref
