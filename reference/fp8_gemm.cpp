#include "reference/fp8_gemm.h"

#include <Eigen/Core>
#include <algorithm>
#include <cmath>
#include <vector>

#include "reference/fp8_quant.h"

namespace v3b::ref {
namespace {

using spec::f8e4m3;
using spec::kFp8Block;

template <class S>
Eigen::Matrix<S, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor> decode(const f8e4m3* q,
                                                                         int64_t rows,
                                                                         int64_t cols) {
  Eigen::Matrix<S, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor> out(rows, cols);
  for (int64_t i = 0; i < rows * cols; ++i) out.data()[i] = static_cast<S>(spec::to_float(q[i]));
  return out;
}

constexpr int64_t kStripRows = 64;
constexpr int64_t kMmaDepth = 32;  // products that one FP8 WGMMA sums along K

// Adds the products to `sum` as the tensor core does: everything on the grid of the largest
// exponent.
double add_aligned(double sum, const double* products, int64_t count, int mantissa_bits) {
  double largest = std::abs(sum);
  for (int64_t i = 0; i < count; ++i) largest = std::max(largest, std::abs(products[i]));
  if (!(largest > 0) || !std::isfinite(largest)) {
    for (int64_t i = 0; i < count; ++i) sum += products[i];
    return sum;
  }
  const double step = std::ldexp(1.0, std::ilogb(largest) - (mantissa_bits - 1));
  double units = std::trunc(sum / step);
  for (int64_t i = 0; i < count; ++i) units += std::trunc(products[i] / step);
  return units * step;
}

}  // namespace

template <class S>
void fp8_gemm(int64_t m, int64_t n, int64_t k, const f8e4m3* qa, const float* sa, const f8e4m3* qb,
              const float* sb, S* c) {
  using Rows = Eigen::Matrix<S, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;
  const Rows A = decode<S>(qa, m, k), B = decode<S>(qb, n, k);
  Eigen::Map<Rows> C(c, m, n);
  C.setZero();
  const int64_t kb = spec::fp8_blocks(k);
  // Strips of rows for the threads; the small products inside stay on one thread each.
#pragma omp parallel for schedule(static)
  for (int64_t r = 0; r < m; r += kStripRows) {
    const int64_t rows = std::min(kStripRows, m - r);
    for (int64_t b = 0; b < kb; ++b) {
      const int64_t k0 = b * kFp8Block, kn = std::min(kFp8Block, k - k0);
      const Rows dot = A.block(r, k0, rows, kn) * B.middleCols(k0, kn).transpose();
      for (int64_t i = 0; i < rows; ++i) {
        for (int64_t j = 0; j < n; ++j) {
          C(r + i, j) += dot(i, j) * (static_cast<S>(sa[(r + i) * kb + b]) *
                                      static_cast<S>(sb[j / kFp8Block * kb + b]));
        }
      }
    }
  }
}

void fp8_gemm_hopper(int64_t m, int64_t n, int64_t k, const f8e4m3* qa, const float* sa,
                     const f8e4m3* qb, const float* sb, float* c, HopperAccumulator acc) {
  const int64_t kb = spec::fp8_blocks(k);
  const int64_t segment = acc.promote_every > 0 ? acc.promote_every : std::max<int64_t>(k, 1);
  const bool scale_outside = segment <= kFp8Block && kFp8Block % segment == 0;
  for (int64_t i = 0; i < m; ++i) {
    for (int64_t j = 0; j < n; ++j) {
      float total = 0;
      for (int64_t k0 = 0; k0 < k; k0 += segment) {
        const int64_t k1 = std::min(k, k0 + segment);
        double sum = 0;
        for (int64_t t = k0; t < k1; t += kMmaDepth) {
          double products[kMmaDepth];
          const int64_t count = std::min(kMmaDepth, k1 - t);
          for (int64_t u = 0; u < count; ++u) {
            const double p = static_cast<double>(spec::to_float(qa[i * k + t + u])) *
                             static_cast<double>(spec::to_float(qb[j * k + t + u]));
            const int64_t b = (t + u) / kFp8Block;
            products[u] = scale_outside ? p : p * sa[i * kb + b] * sb[j / kFp8Block * kb + b];
          }
          sum = add_aligned(sum, products, count, acc.mantissa_bits);
        }
        const int64_t b = k0 / kFp8Block;
        total += scale_outside
                     ? static_cast<float>(sum) * (sa[i * kb + b] * sb[j / kFp8Block * kb + b])
                     : static_cast<float>(sum);
      }
      c[i * n + j] = total;
    }
  }
}

template void fp8_gemm<float>(int64_t, int64_t, int64_t, const f8e4m3*, const float*, const f8e4m3*,
                              const float*, float*);
template void fp8_gemm<double>(int64_t, int64_t, int64_t, const f8e4m3*, const float*,
                               const f8e4m3*, const float*, double*);

}  // namespace v3b::ref
