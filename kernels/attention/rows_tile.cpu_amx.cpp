// The register tile of rows.h for AMX. Scores: the keys as they lie (16 rows of 32 elements) are the A tile, the packed
// queries [d / 2][row][2] the B tile, so S^T [key][row] comes out with rows as lanes, as at the other levels. Values:
// P is stored row by row (softmax_512<true> transposes 16 x 16 pairs in registers) and is the A tile, V in pairs of keys
// the B tile.
//
// Bound. TDPBF16PS of full tiles: 16 cycles. 2 x 2 tiles of C: 4 products (64 cycles) for 2 + 2 tile loads of 16 lines
// (32 cycles of both load ports from L1, 1 line a cycle). For 128 heads, d 576/512, a key: scores 8 x 18 = 144 cycles,
// values 8 x 16 = 128: 272. Beside them, on the vector ports and not overlapped: softmax 8 vectors x (11 / 2 + 1) = 52,
// the transposed store 8 x 2 = 16, V in pairs 16 x 1.5 = 24, tiles of C for values (load and store, 4 x 8 + 4 x 16 cycles
// for 8 steps of k with 256 keys a block) 128 x 96 / 512 = 24: 116. 272 / (272 + 116) = 0.70 where the products run at
// their peak and 272 / (272 / 0.55 + 116) = 0.45 where the loop of tiles gives 0.55 of it. Memory: 1152 bytes in 390
// cycles, 7 GB/s of a core at 2.5 GHz: behind the arithmetic as long as it is fetched ahead, which the products' loops
// do. L2 (2 MiB): a block's keys 288 KiB, V 256, o 256, q 144, scores 64, P 32: 1040 KiB, and as much again of keys
// that come. 16 heads: scores and values 34 cycles a key, one B tile for two A tiles (3 loads for 2 products: 24 of 32
// cycles), V in pairs 24: about 80 cycles for 1152 bytes are 36 GB/s of a core: bound by memory.
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>

#include "kernels/attention/rows.h"
#include "kernels/attention/rows_vec512-inl.h"
#include "kernels/core/amx.h"

namespace v3b::kern {
namespace {

constexpr int64_t kTileRows = 16, kTileBytes = 64;

struct Walk {
  const char* p;
  int64_t lines;  // a step
  const char* end;
};

// A tile of `rows` rows; the rows of the matrix end there, so a short one is put together first.
template <int T>
inline void load_rows(const char* p, int64_t stride, int64_t rows) {
  if (rows == kTileRows) return amx::load<T>(p, stride);
  alignas(64) char part[kTileRows * kTileBytes] = {};
  for (int64_t r = 0; r < rows; ++r) std::memcpy(part + r * kTileBytes, p + r * stride, kTileBytes);
  amx::load<T>(part, kTileBytes);
}
template <int T>
inline void store_rows(float* p, int64_t ld, int64_t rows) {
  if (rows == kTileRows) return amx::store<T>(p, 4 * ld);
  alignas(64) float part[kTileRows * 16];
  amx::store<T>(part, kTileBytes);
  for (int64_t r = 0; r < rows; ++r) std::memcpy(p + r * ld, part + r * 16, kTileBytes);
}

// MT x NT tiles of C; the last tile of A has `rows` rows. C is added to if `add`.
template <int MT, int NT>
inline void block(int64_t rows, const char* a, int64_t a_m, const char* b, int64_t b_k, int64_t K,
                  float* c, int64_t ldc, bool add, Walk& ahead) {
  const int64_t first = MT == 2 ? kTileRows : rows;
  float* c1 = c + kTileRows * ldc;
  if (add) {
    load_rows<0>(reinterpret_cast<const char*>(c), 4 * ldc, first);
    if constexpr (NT == 2) load_rows<1>(reinterpret_cast<const char*>(c + 16), 4 * ldc, first);
    if constexpr (MT == 2) load_rows<2>(reinterpret_cast<const char*>(c1), 4 * ldc, rows);
    if constexpr (MT == 2 && NT == 2)
      load_rows<3>(reinterpret_cast<const char*>(c1 + 16), 4 * ldc, rows);
  } else {
    amx::zero<0>();
    if constexpr (NT == 2) amx::zero<1>();
    if constexpr (MT == 2) amx::zero<2>();
    if constexpr (MT == 2 && NT == 2) amx::zero<3>();
  }
  for (int64_t k = 0; k < K; k += 16) {
    amx::load<6>(b, b_k);
    load_rows<4>(a, a_m, first);
    amx::dpbf16<0, 4, 6>();
    if constexpr (NT == 2) {
      amx::load<7>(b + kTileBytes, b_k);
      amx::dpbf16<1, 4, 7>();
    }
    if constexpr (MT == 2) {
      load_rows<5>(a + kTileRows * a_m, a_m, rows);
      amx::dpbf16<2, 5, 6>();
    }
    if constexpr (MT == 2 && NT == 2) amx::dpbf16<3, 5, 7>();
    for (int64_t i = 0; i < ahead.lines && ahead.p < ahead.end; ++i, ahead.p += 64)
      _mm_prefetch(ahead.p, _MM_HINT_T1);
    a += kTileBytes;
    b += 16 * b_k;
  }
  store_rows<0>(c, ldc, first);
  if constexpr (NT == 2) store_rows<1>(c + 16, ldc, first);
  if constexpr (MT == 2) store_rows<2>(c1, ldc, rows);
  if constexpr (MT == 2 && NT == 2) store_rows<3>(c1 + 16, ldc, rows);
}

// K is a multiple of 16, A's units lie one after another (a_k = 4).
void tile(int64_t M, const void* a, int64_t a_m, int64_t, const void* b, int64_t nv, int64_t K,
          float* c, int64_t ldc, const float* c_scale, Ahead ahead) {
  const char* pa = static_cast<const char*>(a);
  const char* pb = static_cast<const char*>(b);
  const int64_t b_k = nv * kTileBytes;
  if (c_scale != nullptr)  // mostly 1 after the first blocks (kSlack)
    for (int64_t m = 0; m < M; ++m)
      if (!(c_scale[m] == 1.0f)) {
        const __m512 f = _mm512_set1_ps(c_scale[m]);
        for (int64_t n = 0; n < nv; ++n) {
          float* p = c + m * ldc + 16 * n;
          _mm512_storeu_ps(p, _mm512_mul_ps(f, _mm512_loadu_ps(p)));
        }
      }
  const bool add = c_scale != nullptr;
  const int64_t steps = (M + 31) / 32 * ((nv + 1) / 2) * (K / 16), lines = (ahead.bytes + 63) / 64;
  const char* next = static_cast<const char*>(ahead.p);
  Walk w{next, steps > 0 ? (lines + steps - 1) / steps : 0, next + ahead.bytes};
  for (int64_t m = 0; m < M; m += 32) {
    const int64_t rows = M - m < 32 ? M - m : 32;
    const char* am = pa + m * a_m;
    for (int64_t n = 0; n < nv; n += 2) {
      const char* bn = pb + n * kTileBytes;
      float* cm = c + m * ldc + 16 * n;
      if (rows > 16 && n + 1 < nv)
        block<2, 2>(rows - 16, am, a_m, bn, b_k, K, cm, ldc, add, w);
      else if (rows > 16)
        block<2, 1>(rows - 16, am, a_m, bn, b_k, K, cm, ldc, add, w);
      else if (n + 1 < nv)
        block<1, 2>(rows, am, a_m, bn, b_k, K, cm, ldc, add, w);
      else
        block<1, 1>(rows, am, a_m, bn, b_k, K, cm, ldc, add, w);
    }
  }
}

void begin() {
  amx::Config config;
  for (int t = 0; t < 8; ++t) config.tile(t, kTileRows, kTileBytes);
  amx::configure(config);
}
void end() { amx::release(); }
}  // namespace

RowsKernels V3B_AMX_ENTRY(rows_kernels_amx)() noexcept {
  RowsKernels k{};
  k.tile = tile;
  k.softmax = softmax_512<true>;
  k.pack_values = pack_values_512;
  k.pack_lanes = pack_lanes_512;
  k.read_record = read_record_512;
  k.store_turned = store_turned_512;
  k.begin = begin;
  k.end = end;
  k.key_block =
      256;  // tiles of C for values: 24 cycles a key of loads and stores; with 128 keys 48
  k.unit = 16;
  k.p_rows = true;
  return k;
}

}  // namespace v3b::kern
