// The register tile of rows.h for AVX512_BF16: VDPBF16PS with the broadcast operand from memory, 24
// accumulators. Everything but the entry points has internal linkage (DESIGN 1, rule 6).
// Bound: one VDPBF16PS a cycle (16 lanes of pairs); beside 24 of them 4 + 6 loads and one prefetch, of 2 and 1 (512
// bits) a cycle.
// GCC 12 warns about the undefined registers inside its own AVX-512 headers (its bug 105593).
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>

#include <cstdint>
#include <cstring>

#include "kernels/attention/rows.h"
#include "kernels/attention/rows_vec512-inl.h"

namespace v3b::kern {
namespace {

// Where the prefetches of a call stand: `step` bytes on at each k.
struct Walk {
  const char* p;
  int64_t step;
};

template <int MR, int NR>
inline __attribute__((always_inline)) void tile(const char* a, int64_t a_m, int64_t a_k,
                                                const char* b, int64_t K, float* c, int64_t ldc,
                                                const float* c_scale, Walk& ahead) {
  __m512 acc[MR][NR];
#pragma GCC unroll 16
  for (int m = 0; m < MR; ++m) {
#pragma GCC unroll 4
    for (int n = 0; n < NR; ++n)
      acc[m][n] =
          c_scale ? _mm512_mul_ps(_mm512_set1_ps(c_scale[m]), _mm512_loadu_ps(c + m * ldc + 16 * n))
                  : _mm512_setzero_ps();
  }
  const char* next = ahead.p;
  const int64_t step = ahead.step;
  for (int64_t k = 0; k < K; ++k) {
    _mm_prefetch(next, _MM_HINT_T1);
    next += step;
    __m512bh vb[NR];
#pragma GCC unroll 4
    for (int n = 0; n < NR; ++n) vb[n] = (__m512bh)_mm512_loadu_si512(b + 64 * n);
#pragma GCC unroll 16
    for (int m = 0; m < MR; ++m) {
      int32_t pair;
      std::memcpy(&pair, a + m * a_m, 4);
      const __m512bh va = (__m512bh)_mm512_set1_epi32(pair);
#pragma GCC unroll 4
      for (int n = 0; n < NR; ++n) acc[m][n] = _mm512_dpbf16_ps(acc[m][n], va, vb[n]);
    }
    a += a_k;
    b += 64 * NR;
  }
  ahead.p = next;
#pragma GCC unroll 16
  for (int m = 0; m < MR; ++m) {
#pragma GCC unroll 4
    for (int n = 0; n < NR; ++n) _mm512_storeu_ps(c + m * ldc + 16 * n, acc[m][n]);
  }
}

// 16 rows and one vector of lanes, A's units one after another: as many loads as products would bind, so a quarter of
// the rows comes from registers (16 units each), broadcast by a shuffle, and every second k fetches ahead.
inline __attribute__((always_inline)) void tile_16x1(const char* a, int64_t a_m, const char* b,
                                                     int64_t K, float* c, int64_t ldc,
                                                     Walk& ahead) {
  constexpr int kFromMemory = 12;
  __m512 acc[16];
#pragma GCC unroll 16
  for (int m = 0; m < 16; ++m) acc[m] = _mm512_setzero_ps();
  const char* next = ahead.p;
  const int64_t step = 2 * ahead.step;
  const auto memory_rows = [&](int count, __m512bh vb) __attribute__((always_inline)) {
#pragma GCC unroll 16
    for (int m = 0; m < count; ++m) {
      int32_t unit;
      std::memcpy(&unit, a + m * a_m, 4);
      acc[m] = _mm512_dpbf16_ps(acc[m], (__m512bh)_mm512_set1_epi32(unit), vb);
    }
  };
  int64_t k = 0;
  for (; k + 16 <= K; k += 16) {
    __m512i row[16 - kFromMemory];
#pragma GCC unroll 4
    for (int m = 0; m < 16 - kFromMemory; ++m)
      row[m] = _mm512_loadu_si512(a + (kFromMemory + m) * a_m);
    __m512i index = _mm512_setzero_si512();
    for (int i = 0; i < 16; i += 2) {
      _mm_prefetch(next, _MM_HINT_T1);
      next += step;
#pragma GCC unroll 2
      for (int j = 0; j < 2; ++j) {
        const __m512bh vb = (__m512bh)_mm512_loadu_si512(b);
        memory_rows(kFromMemory, vb);
#pragma GCC unroll 4
        for (int m = 0; m < 16 - kFromMemory; ++m)
          acc[kFromMemory + m] = _mm512_dpbf16_ps(
              acc[kFromMemory + m], (__m512bh)_mm512_permutexvar_epi32(index, row[m]), vb);
        index = _mm512_add_epi32(index, _mm512_set1_epi32(1));
        a += 4;
        b += 64;
      }
    }
  }
  for (; k < K; ++k) {
    memory_rows(16, (__m512bh)_mm512_loadu_si512(b));
    a += 4;
    b += 64;
  }
  ahead.p = next;
#pragma GCC unroll 16
  for (int m = 0; m < 16; ++m) _mm512_storeu_ps(c + m * ldc, acc[m]);
}

template <int MR, int NR>
void panel(int64_t M, const char* a, int64_t a_m, int64_t a_k, const char* b, int64_t K, float* c,
           int64_t ldc, const float* cs, Ahead ahead) {
  int64_t m = 0;
  // Without anything to fetch: the line of B that is read anyway.
  const int64_t rest = M % MR, rounds = (M / MR + rest / 4 + rest % 4 / 2 + rest % 2) * K;
  Walk w{ahead.p ? static_cast<const char*>(ahead.p) : b,
         rounds > 0 ? (ahead.bytes + rounds - 1) / rounds : 0};
  const auto at = [&](int64_t i) { return a + i * a_m; };
  const auto scale_at = [&](int64_t i) { return cs ? cs + i : nullptr; };
  if (NR == 1 && a_k == 4 && cs == nullptr)
    for (; m + 16 <= M; m += 16) tile_16x1(at(m), a_m, b, K, c + m * ldc, ldc, w);
  for (; m + MR <= M; m += MR)
    tile<MR, NR>(at(m), a_m, a_k, b, K, c + m * ldc, ldc, scale_at(m), w);
  for (; m + 4 <= M; m += 4) tile<4, NR>(at(m), a_m, a_k, b, K, c + m * ldc, ldc, scale_at(m), w);
  for (; m + 2 <= M; m += 2) tile<2, NR>(at(m), a_m, a_k, b, K, c + m * ldc, ldc, scale_at(m), w);
  for (; m < M; ++m) tile<1, NR>(at(m), a_m, a_k, b, K, c + m * ldc, ldc, scale_at(m), w);
}

// The same with B's pairs put together from two rows of V as they are read, MR rows and 64 columns. The shuffles (4 for
// 24 products) run beside the multipliers.
template <int MR>
inline __attribute__((always_inline)) void direct_tile(const char* a, int64_t a_m, int64_t a_k,
                                                       const char* b, int64_t ldb, int64_t K,
                                                       float* c, int64_t ldc, const float* c_scale,
                                                       Walk& ahead) {
  const __m512i low = low_pairs(), high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
  __m512 acc[MR][4];
#pragma GCC unroll 6
  for (int m = 0; m < MR; ++m) {
#pragma GCC unroll 4
    for (int n = 0; n < 4; ++n)
      acc[m][n] = _mm512_mul_ps(_mm512_set1_ps(c_scale[m]), _mm512_loadu_ps(c + m * ldc + 16 * n));
  }
  const char* next = ahead.p;
  const int64_t step = ahead.step;
  const auto pair = [&](const __m512i* r) __attribute__((always_inline)) {
    const __m512bh vb[4] = {(__m512bh)_mm512_permutex2var_epi16(r[0], low, r[2]),
                            (__m512bh)_mm512_permutex2var_epi16(r[0], high, r[2]),
                            (__m512bh)_mm512_permutex2var_epi16(r[1], low, r[3]),
                            (__m512bh)_mm512_permutex2var_epi16(r[1], high, r[3])};
#pragma GCC unroll 6
    for (int m = 0; m < MR; ++m) {
      int32_t unit;
      std::memcpy(&unit, a + m * a_m, 4);
      const __m512bh va = (__m512bh)_mm512_set1_epi32(unit);
#pragma GCC unroll 4
      for (int n = 0; n < 4; ++n) acc[m][n] = _mm512_dpbf16_ps(acc[m][n], va, vb[n]);
    }
    a += a_k;
  };
  for (int64_t k = 0; k + 2 <= K; k += 2) {
    _mm_prefetch(next, _MM_HINT_T1);
    next += step;
    const __m512i r[4] = {_mm512_loadu_si512(b), _mm512_loadu_si512(b + 64),
                          _mm512_loadu_si512(b + ldb), _mm512_loadu_si512(b + ldb + 64)};
    pair(r);
    b += 2 * ldb;
  }
  if (K % 2 != 0) {
    const __m512i r[4] = {_mm512_loadu_si512(b), _mm512_loadu_si512(b + 64), _mm512_setzero_si512(),
                          _mm512_setzero_si512()};
    pair(r);
  }
  ahead.p = next;
#pragma GCC unroll 6
  for (int m = 0; m < MR; ++m) {
#pragma GCC unroll 4
    for (int n = 0; n < 4; ++n) _mm512_storeu_ps(c + m * ldc + 16 * n, acc[m][n]);
  }
}

void direct(int64_t M, const void* a, int64_t a_m, int64_t a_k, const void* b, int64_t ldb, int64_t,
            int64_t K, float* c, int64_t ldc, const float* c_scale, Ahead ahead) {
  const char *pa = static_cast<const char*>(a), *pb = static_cast<const char*>(b);
  const int64_t rest = M % 6, rounds = (M / 6 + rest / 4 + rest % 4 / 2 + rest % 2) * (K / 2);
  Walk w{ahead.p ? static_cast<const char*>(ahead.p) : pb,
         rounds > 0 ? (ahead.bytes + rounds - 1) / rounds : 0};
  int64_t m = 0;
  for (; m + 6 <= M; m += 6)
    direct_tile<6>(pa + m * a_m, a_m, a_k, pb, ldb, K, c + m * ldc, ldc, c_scale + m, w);
  for (; m + 4 <= M; m += 4)
    direct_tile<4>(pa + m * a_m, a_m, a_k, pb, ldb, K, c + m * ldc, ldc, c_scale + m, w);
  for (; m + 2 <= M; m += 2)
    direct_tile<2>(pa + m * a_m, a_m, a_k, pb, ldb, K, c + m * ldc, ldc, c_scale + m, w);
  for (; m < M; ++m)
    direct_tile<1>(pa + m * a_m, a_m, a_k, pb, ldb, K, c + m * ldc, ldc, c_scale + m, w);
}
}  // namespace

void rows_tile_avx512bf16(int64_t M, const void* a, int64_t a_m, int64_t a_k, const void* b,
                          int64_t nv, int64_t K, float* c, int64_t ldc, const float* cs,
                          Ahead ahead) noexcept {
  const char* pa = static_cast<const char*>(a);
  const char* pb = static_cast<const char*>(b);
  switch (nv) {
    case 1:
      return panel<16, 1>(M, pa, a_m, a_k, pb, K, c, ldc, cs, ahead);
    case 2:
      return panel<12, 2>(M, pa, a_m, a_k, pb, K, c, ldc, cs, ahead);
    case 3:
      return panel<8, 3>(M, pa, a_m, a_k, pb, K, c, ldc, cs, ahead);
    default:
      return panel<6, 4>(M, pa, a_m, a_k, pb, K, c, ldc, cs, ahead);
  }
}

RowsKernels rows_kernels_avx512bf16() noexcept {
  RowsKernels k{};
  k.tile = rows_tile_avx512bf16;
  k.softmax = softmax_512<false>;
  k.pack_values = pack_values_512;
  k.pack_lanes = pack_lanes_512;
  k.read_record = read_record_512;
  k.store_turned = store_turned_512;
  k.direct = direct;
  return k;
}

}  // namespace v3b::kern
