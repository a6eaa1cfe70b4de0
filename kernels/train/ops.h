// Elementwise building blocks of the training step, templated on the arithmetic type R (float, or
// double for the gradient check) and the GEMM operand type X (bf16, float or double). SPEC 3.1-3.4.
// Sums over tokens go through partial sums of fixed row blocks: results do not depend on the number
// of threads. Internal to kernels/train.
#pragma once
#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <type_traits>
#include <vector>

#include "kernels/core/buffer.h"
#include "kernels/gemm/gemm.h"
#include "reference/spec/dtype.h"

namespace v3b::kern::train {

using spec::bf16;

template <class X>
inline auto ld(X x) {
  if constexpr (std::is_same_v<X, bf16>) {
    return std::bit_cast<float>(static_cast<uint32_t>(x.bits) << 16);
  } else {
    return x;
  }
}
template <class X, class R>
inline X st(R v) {
  if constexpr (std::is_same_v<X, bf16>) {
    const uint32_t u = std::bit_cast<uint32_t>(v);
    const uint32_t rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
    const uint32_t quiet = (u >> 16) | 0x40u;
    return bf16{static_cast<uint16_t>((u & 0x7fffffffu) > 0x7f800000u ? quiet : rounded)};
  } else {
    return static_cast<X>(v);
  }
}

// exp for vector loops: float by 2^n * polynomial (relative error below 2e-7), double by libm.
inline float exp_of(float x) {
  x = x < -87.0F ? -87.0F : x;
  x = x > 88.0F ? 88.0F : x;
  constexpr float kMagic = 12582912.0F;  // 1.5 * 2^23: rounds to an integer in the low bits
  const float t = x * 1.44269504F + kMagic;
  const float n = t - kMagic;
  const float f = (x - n * 0.693359375F) + n * 2.12194440e-4F;
  float p = 1.9875691500e-4F;
  p = p * f + 1.3981999507e-3F;
  p = p * f + 8.3334519073e-3F;
  p = p * f + 4.1665795894e-2F;
  p = p * f + 1.6666665459e-1F;
  p = p * f + 5.0000001201e-1F;
  p = p * f * f + f + 1.0F;
  const uint32_t bits = (std::bit_cast<uint32_t>(t) << 23) + 0x3f800000u;
  return p * std::bit_cast<float>(bits);
}
inline double exp_of(double x) { return std::exp(x); }
template <class R>
inline R sigmoid_of(R x) {
  return R(1) / (R(1) + exp_of(-x));
}

// C[M,N] (+)= op(A) op(B), leading strides in elements; see kernels/gemm/gemm.h.
template <class X, class R>
void mm(int64_t M, int64_t N, int64_t K, const X* a, int64_t lda, bool ta, const X* b, int64_t ldb,
        bool tb, R* c, int64_t ldc, bool acc) {
  if constexpr (std::is_same_v<R, double>) {
#pragma omp parallel for schedule(static)
    for (int64_t i = 0; i < M; ++i) {
      for (int64_t j = 0; j < N; ++j) {
        double s = acc ? c[i * ldc + j] : 0.0;
        for (int64_t k = 0; k < K; ++k) {
          s += a[ta ? k * lda + i : i * lda + k] * b[tb ? j * ldb + k : k * ldb + j];
        }
        c[i * ldc + j] = s;
      }
    }
  } else {
    GemmArgs g;
    g.M = M, g.N = N, g.K = K;
    g.a = a, g.lda = lda, g.trans_a = ta;
    g.b = b, g.ldb = ldb, g.trans_b = tb;
    g.c = c, g.ldc = ldc, g.accumulate = acc;
    g.ab_type = std::is_same_v<X, bf16> ? spec::DType::bf16 : spec::DType::f32;
    gemm(g);
  }
}
// y = x W^T
template <class X, class R>
void mm_fwd(int64_t rows, int64_t out, int64_t in, const X* x, const X* w, R* y, bool acc = false) {
  mm(rows, out, in, x, in, false, w, in, true, y, out, acc);
}
// dx = dy W
template <class X, class R>
void mm_dx(int64_t rows, int64_t out, int64_t in, const X* dy, const X* w, R* dx,
           bool acc = false) {
  mm(rows, in, out, dy, out, false, w, in, false, dx, in, acc);
}
// dW += dy^T x
template <class X, class R>
void mm_dw(int64_t rows, int64_t out, int64_t in, const X* dy, const X* x, R* dw) {
  mm(out, in, rows, dy, out, true, x, in, false, dw, in, true);
}

template <class X, class R>
void convert_rows(const R* src, X* dst, int64_t n) {
#pragma omp parallel for schedule(static)
  for (int64_t i0 = 0; i0 < n; i0 += 4096) {
    const int64_t i1 = std::min(n, i0 + 4096);
    for (int64_t i = i0; i < i1; ++i) dst[i] = st<X>(src[i]);
  }
}

// y = x * rstd * w over rows; y_r (if given) keeps the unrounded result. Strides in elements.
template <class R, class X>
void rmsnorm_fwd(int64_t rows, int64_t d, const R* x, int64_t ldx, const R* w, double eps, X* y,
                 int64_t ldy, R* rstd, R* y_r = nullptr) {
#pragma omp parallel for schedule(static)
  for (int64_t i = 0; i < rows; ++i) {
    const R* xi = x + i * ldx;
    R s = 0;
#pragma omp simd reduction(+ : s)
    for (int64_t j = 0; j < d; ++j) s += xi[j] * xi[j];
    const R r = R(1) / std::sqrt(s / R(d) + R(eps));
    rstd[i] = r;
    X* yi = y + i * ldy;
    for (int64_t j = 0; j < d; ++j) yi[j] = st<X>(xi[j] * r * w[j]);
    if (y_r != nullptr) {
      R* yr = y_r + i * d;
      for (int64_t j = 0; j < d; ++j) yr[j] = xi[j] * r * w[j];
    }
  }
}

inline constexpr int64_t kNormBlock = 128;  // rows a partial sum of the weight gradient

// dx = base + backward(dy) (base may be null, may be dx itself); dw += sum over rows. O is R or X.
template <class R, class O>
void rmsnorm_bwd(int64_t rows, int64_t d, const R* dy, int64_t lddy, const R* x, int64_t ldx,
                 const R* w, const R* rstd, const R* base, O* dx, int64_t lddx, R* dw,
                 std::vector<R>& partial) {
  const int64_t blocks = (rows + kNormBlock - 1) / kNormBlock;
  partial.assign(static_cast<size_t>(blocks * d), R(0));
#pragma omp parallel for schedule(static)
  for (int64_t b = 0; b < blocks; ++b) {
    R* pw = partial.data() + b * d;
    const int64_t hi = std::min(rows, (b + 1) * kNormBlock);
    for (int64_t i = b * kNormBlock; i < hi; ++i) {
      const R* g = dy + i * lddy;
      const R* xi = x + i * ldx;
      const R r = rstd[i];
      R s = 0;
#pragma omp simd reduction(+ : s)
      for (int64_t j = 0; j < d; ++j) s += g[j] * w[j] * xi[j];
      const R k = r * r * r / R(d) * s;
#pragma omp simd
      for (int64_t j = 0; j < d; ++j) pw[j] += g[j] * xi[j] * r;
      O* o = dx + i * lddx;  // may be x's own row
      if (base != nullptr) {
        const R* bi = base + i * d;
#pragma omp simd
        for (int64_t j = 0; j < d; ++j) o[j] = st<O>(bi[j] + (r * w[j] * g[j] - k * xi[j]));
      } else {
#pragma omp simd
        for (int64_t j = 0; j < d; ++j) o[j] = st<O>(r * w[j] * g[j] - k * xi[j]);
      }
    }
  }
  for (int64_t b = 0; b < blocks; ++b) {
    for (int64_t j = 0; j < d; ++j) dw[j] += partial[static_cast<size_t>(b * d + j)];
  }
}

// One row of SwiGLU: h = scale * silu(g) * u.
template <class R, class X>
inline void swiglu_row(const R* g, const R* u, int64_t m, R scale, X* h) {
#pragma omp simd
  for (int64_t j = 0; j < m; ++j) h[j] = st<X>(scale * g[j] * sigmoid_of(g[j]) * u[j]);
}
// dh is the gradient of the unscaled product; writes [dg | du] (times `scale`) and returns
// <dh, silu(g) u>.
template <class R, class X>
inline R swiglu_row_bwd(const R* g, const R* u, const R* dh, int64_t m, R scale, X* dgu) {
  R s = 0;
#pragma omp simd reduction(+ : s)
  for (int64_t j = 0; j < m; ++j) {
    const R sg = sigmoid_of(g[j]), silu = g[j] * sg, t = dh[j] * scale;
    s += dh[j] * silu * u[j];
    dgu[j] = st<X>(t * u[j] * sg * (R(1) + g[j] * (R(1) - sg)));
    dgu[m + j] = st<X>(t * silu);
  }
  return s;
}

// Rotates interleaved pairs; direction +1 forward, -1 backward (SPEC 1.3, 3.2).
template <class R>
inline void rope_row(R* v, const R* cos_row, const R* sin_row, int64_t half, R direction) {
  for (int64_t i = 0; i < half; ++i) {
    const R a = v[2 * i], b = v[2 * i + 1], c = cos_row[i], s = direction * sin_row[i];
    v[2 * i] = a * c - b * s;
    v[2 * i + 1] = a * s + b * c;
  }
}

}  // namespace v3b::kern::train
