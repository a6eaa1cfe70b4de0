// Register tile of 8 rows x up to 48 columns: 24 accumulators, one broadcast pair of A a row, three
// vectors of B. VDPBF16PS does 64 FLOPs; the three columns of B hide the broadcast loads.
#include "kernels/train/small_gemm.h"

#include <immintrin.h>

namespace v3b::kern::train {
namespace {

constexpr int kRows = 8;

template <int NV>
inline void tile(int64_t K2, const uint32_t* a, int64_t a_row, int64_t a_pair, const uint32_t* b,
                 int64_t ldb, float* c, int64_t ldc, bool accumulate) {
  __m512 acc[kRows][NV];
  for (int r = 0; r < kRows; ++r) {
    for (int v = 0; v < NV; ++v) {
      acc[r][v] = accumulate ? _mm512_loadu_ps(c + r * ldc + 16 * v) : _mm512_setzero_ps();
    }
  }
  for (int64_t k = 0; k < K2; ++k) {
    __m512i bv[NV];
    for (int v = 0; v < NV; ++v) bv[v] = _mm512_loadu_si512(b + k * ldb + 16 * v);
    const uint32_t* ak = a + k * a_pair;
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const __m512i av = _mm512_set1_epi32(static_cast<int>(ak[r * a_row]));
#pragma GCC unroll 3
      for (int v = 0; v < NV; ++v) {
        acc[r][v] = _mm512_dpbf16_ps(acc[r][v], (__m512bh)av, (__m512bh)bv[v]);
      }
    }
  }
  for (int r = 0; r < kRows; ++r) {
    for (int v = 0; v < NV; ++v) _mm512_storeu_ps(c + r * ldc + 16 * v, acc[r][v]);
  }
}

}  // namespace

void small_gemm_cpu_avx512bf16(int64_t M, int64_t N, int64_t K2, const uint32_t* a, int64_t a_row,
                               int64_t a_pair, const uint32_t* b, int64_t ldb, float* c,
                               int64_t ldc, bool accumulate) noexcept {
  for (int64_t n = 0; n < N;) {
    const int64_t left = N - n;
    for (int64_t m = 0; m < M; m += kRows) {
      const uint32_t* am = a + m * a_row;
      float* cm = c + m * ldc + n;
      if (left >= 48) {
        tile<3>(K2, am, a_row, a_pair, b + n, ldb, cm, ldc, accumulate);
      } else if (left >= 32) {
        tile<2>(K2, am, a_row, a_pair, b + n, ldb, cm, ldc, accumulate);
      } else {
        tile<1>(K2, am, a_row, a_pair, b + n, ldb, cm, ldc, accumulate);
      }
    }
    n += left >= 48 ? 48 : left >= 32 ? 32 : 16;
  }
}

}  // namespace v3b::kern::train
