// Stores of sums, bf16 rounded to nearest even: the transposed one of gemm_tile, 16 x 16 floats through registers, and rows.
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include "kernels/gemm/first_lanes_avx512-inl.h"
#include "kernels/gemm/packed_many.h"
#include "kernels/gemm/tile.h"
#include "kernels/gemm/transpose_avx512-inl.h"

namespace v3b::kern {
namespace {

inline __m256i round_bf16(__m512 v) noexcept {
  const __m512i u = _mm512_castps_si512(v);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
  __m512i r =
      _mm512_srli_epi32(_mm512_add_epi32(u, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff))), 16);
  const __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
  r = _mm512_mask_or_epi32(r, nan, _mm512_srli_epi32(u, 16), _mm512_set1_epi32(0x40));
  return _mm512_cvtepi32_epi16(r);
}

}  // namespace

void tile_store_transposed_cpu_avx512(const StoreArgs& a) noexcept {
  for (int64_t l = 0; l < a.lanes; l += 16) {
    const int64_t lanes = a.lanes - l < 16 ? a.lanes - l : 16;
    for (int64_t r = 0; r < a.rows; r += 16) {
      const int64_t rows = a.rows - r < 16 ? a.rows - r : 16;
      const __mmask16 lane_mask = first_n(lanes), row_mask = first_n(rows);
      __m512i v[16];
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i)
        v[i] = i < rows ? _mm512_maskz_loadu_epi32(lane_mask, a.from + (r + i) * a.ld_from + l)
                        : _mm512_setzero_si512();
      transpose16(v);
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i) {
        if (i >= lanes) break;
        const int64_t at = (l + i) * a.ldc + r;
        __m512 sum = _mm512_castsi512_ps(v[i]);
        if (a.type == spec::DType::bf16) {
          _mm256_mask_storeu_epi16(static_cast<spec::bf16*>(a.c) + at, row_mask, round_bf16(sum));
        } else {
          float* c = static_cast<float*>(a.c) + at;
          if (a.accumulate) sum = _mm512_add_ps(sum, _mm512_maskz_loadu_ps(row_mask, c));
          _mm512_mask_storeu_ps(c, row_mask, sum);
        }
      }
    }
  }
}

void packed_narrow_cpu_avx512(const float* from, void* to, int64_t n) noexcept {
  auto* c = static_cast<uint16_t*>(to);
  for (int64_t i = 0; i < n; i += 16) {
    const __mmask16 mask = first_n(n - i);
    _mm256_mask_storeu_epi16(c + i, mask, round_bf16(_mm512_maskz_loadu_ps(mask, from + i)));
  }
}

}  // namespace v3b::kern
