// Choice of the FP8 kernel and the threads around its one-thread pieces.
#include <omp.h>

#include <algorithm>
#include <cstring>

#include "kernels/core/buffer.h"
#include "kernels/core/cpu.h"
#include "kernels/core/team.h"
#include "kernels/gemm/fp8.h"

namespace v3b::kern {
namespace {

// Up to here the streaming form wins (measured): beyond, widening once per six rows costs more than
// packing.
constexpr int64_t kGemvRows = 24;

void zero_c(const spec::Fp8GemmArgs& a) {
  std::memset(a.c, 0, static_cast<size_t>(a.m * a.n * spec::dtype_bytes(a.c_type)));
}

}  // namespace

bool fp8_gemm_avx512bf16_supported() {
  static const bool vbmi = __builtin_cpu_supports("avx512vbmi") != 0;
  return vbmi && cpu_features().avx512_bf16;
}

void fp8_gemm_cpu_avx512bf16(const spec::Fp8GemmArgs& g) noexcept {
  if (g.m == 0 || g.n == 0) return;
  if (g.k == 0) return zero_c(g);
  const int64_t kp = spec::fp8_blocks(g.k) * spec::kFp8Block;
  thread_local Buffer<spec::bf16> wide;
  wide.reserve_discard(g.m * kp);
  spec::bf16* a = wide.data();
  // Widening the codes costs about as much again as reading them.
  const double weights = static_cast<double>(g.n) * static_cast<double>(g.k);
  const int threads = team_for(2 * weights, 2 * weights * static_cast<double>(g.m));
  if (g.m <= kGemvRows) {
    fp8_widen_rows_avx512bf16(g.qa, g.m, g.k, kp, a);
    if (threads == 1) return fp8_gemv_avx512bf16(g, a, kp, 0, g.n);
#pragma omp parallel num_threads(threads)
    {
      const int64_t t = omp_get_num_threads(), i = omp_get_thread_num(), pairs = (g.n + 1) / 2;
      fp8_gemv_avx512bf16(g, a, kp, pairs * i / t * 2, std::min(g.n, pairs * (i + 1) / t * 2));
    }
    return;
  }
  const int64_t tiles = (g.n + kFp8TileN - 1) / kFp8TileN;
#pragma omp parallel num_threads(threads)
  {
    thread_local Buffer<uint8_t> scratch;
    scratch.reserve_discard(kFp8TileScratchBytes);
#pragma omp for schedule(static)
    for (int64_t i = 0; i < g.m; ++i) {
      fp8_widen_rows_avx512bf16(g.qa + i * g.k, 1, g.k, kp, a + i * kp);
    }
#pragma omp for schedule(dynamic, 1)
    for (int64_t t = 0; t < tiles; ++t) {
      for (int64_t m = 0; m < g.m; m += kFp8TileM) {
        fp8_tile_avx512bf16(g, a, kp, t * kFp8TileN, m, std::min(g.m, m + kFp8TileM),
                            scratch.data());
      }
    }
  }
}

void fp8_gemm(const spec::Fp8GemmArgs& g) noexcept {
  if (fp8_gemm_avx512bf16_supported()) return fp8_gemm_cpu_avx512bf16(g);
  fp8_gemm_cpu_simd(g);
}

}  // namespace v3b::kern
