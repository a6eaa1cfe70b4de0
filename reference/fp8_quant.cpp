#include "reference/fp8_quant.h"

#include <Eigen/Core>
#include <algorithm>
#include <cmath>

namespace v3b::ref {
namespace {

using spec::f8e4m3;
using spec::kFp8Block;
template <class S>
using In = Eigen::Map<const Eigen::Array<S, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>>;
template <class S>
using Out = Eigen::Map<Eigen::Array<S, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>>;

// Calls f(row0, rows, col0, cols, index of the block) for every block of br x bc.
template <class F>
void for_blocks(int64_t rows, int64_t cols, int64_t br, int64_t bc, F&& f) {
  int64_t index = 0;
  for (int64_t r = 0; r < rows; r += br)
    for (int64_t c = 0; c < cols; c += bc)
      f(r, std::min(br, rows - r), c, std::min(bc, cols - c), index++);
}

template <class S>
f8e4m3 code(S x, float scale) {
  return spec::to_f8e4m3(static_cast<float>(x / static_cast<S>(scale)));
}

template <class S, class ScaleOf>
void quantize(int64_t rows, int64_t cols, int64_t br, const S* x, f8e4m3* codes, float* scales,
              ScaleOf&& scale_of) {
  const In<S> X(x, rows, cols);
  for_blocks(rows, cols, br, kFp8Block,
             [&](int64_t r, int64_t nr, int64_t c, int64_t nc, int64_t b) {
               const float s = scale_of(static_cast<float>(X.block(r, c, nr, nc).abs().maxCoeff()));
               scales[b] = s;
               for (int64_t i = r; i < r + nr; ++i)
                 for (int64_t j = c; j < c + nc; ++j) codes[i * cols + j] = code(X(i, j), s);
             });
}

template <class S>
void dequantize(int64_t rows, int64_t cols, int64_t br, const f8e4m3* codes, const float* scales,
                S* x) {
  Out<S> X(x, rows, cols);
  for_blocks(
      rows, cols, br, kFp8Block, [&](int64_t r, int64_t nr, int64_t c, int64_t nc, int64_t b) {
        for (int64_t i = r; i < r + nr; ++i)
          for (int64_t j = c; j < c + nc; ++j)
            X(i, j) =
                static_cast<S>(spec::to_float(codes[i * cols + j])) * static_cast<S>(scales[b]);
      });
}

}  // namespace

float fp8_act_scale(float amax, spec::ActScale kind) {
  const float s = std::max(amax, 1e-4F) / 448.0F;
  return kind == spec::ActScale::ue8m0 ? spec::ceil_pow2(s) : s;
}
float fp8_weight_scale(float amax) { return amax > 0 ? amax / 448.0F : 1.0F; }

template <class S>
void fp8_quantize_act(int64_t rows, int64_t cols, const S* x, f8e4m3* codes, float* scales,
                      spec::ActScale kind) {
  quantize(rows, cols, 1, x, codes, scales,
           [kind](float amax) { return fp8_act_scale(amax, kind); });
}
template <class S>
void fp8_quantize_weight(int64_t rows, int64_t cols, const S* w, f8e4m3* codes, float* scales) {
  quantize(rows, cols, kFp8Block, w, codes, scales, fp8_weight_scale);
}
template <class S>
float fp8_quantize_tensor(int64_t n, const S* x, f8e4m3* codes) {
  const float s =
      fp8_weight_scale(n > 0 ? static_cast<float>(In<S>(x, 1, n).abs().maxCoeff()) : 0.0F);
  for (int64_t i = 0; i < n; ++i) codes[i] = code(x[i], s);
  return s;
}
template <class S>
void fp8_dequantize_act(int64_t rows, int64_t cols, const f8e4m3* codes, const float* scales,
                        S* x) {
  dequantize(rows, cols, 1, codes, scales, x);
}
template <class S>
void fp8_dequantize_weight(int64_t rows, int64_t cols, const f8e4m3* codes, const float* scales,
                           S* w) {
  dequantize(rows, cols, kFp8Block, codes, scales, w);
}

#define V3B_INSTANTIATE(S)                                                                        \
  template void fp8_quantize_act<S>(int64_t, int64_t, const S*, f8e4m3*, float*, spec::ActScale); \
  template void fp8_quantize_weight<S>(int64_t, int64_t, const S*, f8e4m3*, float*);              \
  template float fp8_quantize_tensor<S>(int64_t, const S*, f8e4m3*);                              \
  template void fp8_dequantize_act<S>(int64_t, int64_t, const f8e4m3*, const float*, S*);         \
  template void fp8_dequantize_weight<S>(int64_t, int64_t, const f8e4m3*, const float*, S*);
V3B_INSTANTIATE(float)
V3B_INSTANTIATE(double)

}  // namespace v3b::ref
