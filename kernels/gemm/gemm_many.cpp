// Training's products with VDPBF16PS: B packed once a call by the whole team, then units of rows, each packed by the
// thread that multiplies them (packed_many.h). Bound: packing reads and writes (M + N) K once, which pays from 64 rows on.
#include <omp.h>

#include <algorithm>

#include "kernels/core/buffer.h"
#include "kernels/core/shares.h"
#include "kernels/core/spin_barrier.h"
#include "kernels/gemm/packed_linear.h"
#include "kernels/gemm/packed_many.h"

namespace v3b::kern {
namespace {

constexpr int64_t kLeast = 64;      // rows and outputs
constexpr int64_t kUnitRows = 128;  // 512 KiB of packed rows at K = 2048
constexpr int64_t kWide = 64;       // rows that are packed together: two lines of [K, M]

}  // namespace

bool gemm_many(const GemmArgs& g, int threads) noexcept {
  PackedWeight w;
  w.type = g.ab_type, w.n = g.N, w.k = g.K;
  if (!g.trans_a || g.M < kLeast || g.N < kLeast || g.K < kLeast) return false;
  if (!packed_many_takes(w, g.M)) return false;
  thread_local Buffer<uint8_t> shared;
  shared.reserve_discard(packed_weight_bytes(w.type, g.N, g.K));
  uint8_t* const packed = shared.data();
  w.data = packed;
  PackSource b;
  b.type = g.ab_type, b.w = g.b, b.ld = g.ldb, b.k_major = !g.trans_b, b.n = g.N, b.k = g.K;
  const int64_t groups = packed_groups(g.N), panels = packed_panels(g.K, groups);
  const int64_t row_dwords = packed_rows_dwords(w.type, 1, g.K);
  const int64_t share = (g.M + 4 * threads - 1) / (4 * threads);
  const int64_t size = std::clamp((share + kWide - 1) / kWide * kWide, kWide, kUnitRows);
  const auto unit = [&](int64_t i) {
    thread_local Buffer<uint32_t> rows;
    rows.reserve_discard(size * row_dwords);
    const int64_t r0 = i * size, m = std::min(size, g.M - r0);
    packed_columns_cpu_avx512bf16(static_cast<const uint16_t*>(g.a) + r0, g.lda, m, g.K,
                                  rows.data());
    PackedRows x;
    x.m = m, x.k = g.K, x.data = rows.data();
    LinearOut out;
    out.c = static_cast<uint8_t*>(g.c) + r0 * g.ldc * spec::dtype_bytes(g.c_type);
    out.ldc = g.ldc, out.type = g.c_type, out.add = g.accumulate;
    for (int64_t j = 0; j < panels; ++j)
      packed_many_part(w, x, groups * j / panels, groups * (j + 1) / panels, out);
  };
  Shares shares((g.M + size - 1) / size, threads);
  SpinBarrier packs;
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    const int t = omp_get_thread_num(), team = omp_get_num_threads();
    if (b.k_major) {
      const int64_t steps = row_dwords;
      packed_weight_columns_cpu_avx512bf16(b, reinterpret_cast<uint32_t*>(packed),
                                           Shares::first(steps, t, team),
                                           Shares::first(steps, t + 1, team));
    } else {
      const int64_t g0 = Shares::first(groups, t, team), g1 = Shares::first(groups, t + 1, team);
      pack_weight(b, packed, g0, g1);
    }
    packs.wait(team);
    shares.run(t, unit);
  }
  return true;
}

}  // namespace v3b::kern
