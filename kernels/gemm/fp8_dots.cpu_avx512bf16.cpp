// Few rows of activations against FP8 weight rows: dot products along K with VDPBF16PS.
//
// Bound, one activation row: 64 codes are 64 bytes, 2 table look-ups (VPERMI2B, 2 shuffle slots each), 2 unpacks, one
// ternary and 2 products: about 6 cycles on Zen 4, 32-36 GB/s a core from L1, so two cores can take more than the
// memory gives (45-55 GB/s) if the loads are there in time. They are when each thread reads ONE linear stream with its
// own prefetch 4 KiB ahead: 42-46 GB/s; eight rows at once without prefetch (strides of a row) gave 20-30.
// The unpacks leave the elements in another order; the activations are brought into that order once a call, which
// saves a permutation of every 64 codes (35 -> 43 GB/s).
// Two activation rows: 132 GFLOP/s, the memory's again. From three on the stream is not what binds, and fp8_gemv (two
// weight rows, groups of activation rows) is faster: 190 against 160 GFLOP/s at four rows.
// GCC 12 warns about the undefined registers inside its own AVX-512 headers (its bug 105593).
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC target("avx512vbmi")
#include "kernels/gemm/fp8_dots.h"

#include <immintrin.h>

#include "kernels/gemm/fp8_widen_avx512-inl.h"

namespace v3b::kern {
namespace {

using spec::bf16;
using spec::f8e4m3;

constexpr int64_t kBlock = 128;
constexpr int64_t kAhead = 4096;  // bytes

inline __m512 dot(__m512 acc, __m512i a, __m512i b) noexcept {
  return _mm512_dpbf16_ps(acc, (__m512bh)a, (__m512bh)b);
}
inline __m512i load_codes(const f8e4m3* p, int64_t left) noexcept {
  if (left >= 64) return _mm512_loadu_si512(p);
  if (left <= 0) return _mm512_setzero_si512();
  return _mm512_maskz_loadu_epi8((uint64_t{1} << left) - 1, p);
}

// A block of 128 of one weight row against M activation rows; scale: [M].
template <int M>
inline void block(const WidenTables& t, const bf16* a, __m512i c0, __m512i c1, const float* scale,
                  __m512 (&acc)[M]) noexcept {
  __m512i w0, w1, w2, w3;
  widen_unordered(t, c0, w0, w1);
  widen_unordered(t, c1, w2, w3);
#pragma GCC unroll 8
  for (int i = 0; i < M; ++i) {
    const bf16* r = a + i * kBlock;
    __m512 part = dot(_mm512_setzero_ps(), _mm512_loadu_si512(r), w0);
    part = dot(part, _mm512_loadu_si512(r + 32), w1);
    part = dot(part, _mm512_loadu_si512(r + 64), w2);
    part = dot(part, _mm512_loadu_si512(r + 96), w3);
    acc[i] = _mm512_fmadd_ps(part, _mm512_set1_ps(scale[i]), acc[i]);
  }
}

template <int M>
void rows(const Fp8Dots& d, int64_t n0, int64_t n1) noexcept {
  const WidenTables t = load_widen_tables();
  const int64_t blocks = d.kp / kBlock, whole = d.k / kBlock;
  float* scale = d.scratch;  // [blocks][M], of a block of weight rows
  for (int64_t n = n0; n < n1; ++n) {
    if (n == n0 || n % kBlock == 0) {
      const float* sw = d.sw + n / kBlock * blocks;
      for (int64_t b = 0; b < blocks; ++b)
        for (int i = 0; i < M; ++i)
          scale[b * M + i] = (d.sa == nullptr ? 1.0F : d.sa[i * blocks + b]) * sw[b];
    }
    const f8e4m3* q = d.w + n * d.k;
    __m512 acc[M];
    for (int i = 0; i < M; ++i) acc[i] = _mm512_setzero_ps();
    for (int64_t b = 0; b < whole; ++b) {
      const f8e4m3* p = q + b * kBlock;
      _mm_prefetch(reinterpret_cast<const char*>(p) + kAhead, _MM_HINT_T0);
      _mm_prefetch(reinterpret_cast<const char*>(p) + kAhead + 64, _MM_HINT_T0);
      block<M>(t, d.a + b * M * kBlock, _mm512_loadu_si512(p), _mm512_loadu_si512(p + 64),
               scale + b * M, acc);
    }
    if (whole < blocks) {
      const int64_t at = whole * kBlock;
      block<M>(t, d.a + at * M, load_codes(q + at, d.k - at),
               load_codes(q + at + 64, d.k - at - 64), scale + whole * M, acc);
    }
    for (int i = 0; i < M; ++i) {
      const float v = _mm512_reduce_add_ps(acc[i]);
      const int64_t to = i * d.ldc + n - d.n_base;
      if (d.c_type == spec::DType::bf16) {
        static_cast<bf16*>(d.c)[to] = spec::to_bf16(v);
      } else {
        static_cast<float*>(d.c)[to] = v;
      }
    }
  }
}

inline void store_ordered(bf16* out, int64_t c, __m512i first, __m512i second) noexcept {
  _mm512_storeu_si512(out + c, first);
  _mm512_storeu_si512(out + c + 32, second);
}

}  // namespace

void fp8_dots_cpu_avx512bf16(const Fp8Dots& d, int64_t n0, int64_t n1) noexcept {
  if (d.m == 1) return rows<1>(d, n0, n1);
  rows<2>(d, n0, n1);
}

void fp8_dots_order_codes_cpu_avx512bf16(const f8e4m3* q, int64_t m, int64_t k, int64_t kp,
                                         bf16* out) noexcept {
  const WidenTables t = load_widen_tables();
  for (int64_t i = 0; i < m; ++i) {
    for (int64_t c = 0; c < kp; c += 64) {
      __m512i first, second;
      widen_unordered(t, load_codes(q + i * k + c, k - c), first, second);
      store_ordered(out + (c / kBlock * m + i) * kBlock, c % kBlock, first, second);
    }
  }
}

void fp8_dots_order_cpu_avx512bf16(const bf16* x, int64_t ld, int64_t m, int64_t k, int64_t kp,
                                   bf16* out) noexcept {
  const auto load = [](const bf16* p, int64_t left) noexcept {
    if (left >= 32) return _mm512_loadu_si512(p);
    if (left <= 0) return _mm512_setzero_si512();
    return _mm512_maskz_loadu_epi16(static_cast<__mmask32>((uint64_t{1} << left) - 1), p);
  };
  // Unpacks of byte lanes: the first register holds eight elements of each 16, the second the other eight.
  const __m512i first = _mm512_setr_epi64(0, 1, 4, 5, 8, 9, 12, 13);
  const __m512i second = _mm512_setr_epi64(2, 3, 6, 7, 10, 11, 14, 15);
  for (int64_t i = 0; i < m; ++i) {
    for (int64_t c = 0; c < kp; c += 64) {
      const __m512i lo = load(x + i * ld + c, k - c), hi = load(x + i * ld + c + 32, k - c - 32);
      store_ordered(out + (c / kBlock * m + i) * kBlock, c % kBlock,
                    _mm512_permutex2var_epi64(lo, first, hi),
                    _mm512_permutex2var_epi64(lo, second, hi));
    }
  }
}

}  // namespace v3b::kern
