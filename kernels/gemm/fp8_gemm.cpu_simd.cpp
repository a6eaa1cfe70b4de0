// Block-scaled FP8 product (SPEC 1.23) at every level: one or two rows as dot products on one linear stream of codes
// (fp8_dots.h), some more as dot products in groups, everything else as tiles whose weight rows are widened 128 of K at
// a time in L1 (strip.h), with the scales applied to the sums of each block.
#include <omp.h>

#include <algorithm>
#include <cstring>

#include "kernels/core/buffer.h"
#include "kernels/core/cpu.h"
#include "kernels/core/team.h"
#include "kernels/gemm/fp8.h"
#include "kernels/gemm/fp8_dots.h"
#include "kernels/gemm/strip.h"

namespace v3b::kern {
namespace {

using spec::DType;

constexpr int64_t kGemvRows = 12;   // bf16 products: dot products up to here, then tiles
constexpr int64_t kColumnRows = 4;  // the same in float
constexpr int64_t kUnitGroups = 32;

bool pairs() { return tile_form(DType::f8e4m3, DType::f8e4m3) == TileForm::pairs; }

// Everything that the threads of one call share.
struct Shared {
  Buffer<spec::bf16> wide;
  Buffer<float> wide_f32, scale;
  Buffer<uint32_t> packed;
};
Shared& shared() {
  thread_local Shared s;
  return s;
}

template <class F>
void split_rows(int64_t n, int64_t grain, int threads, F&& f) {
  if (threads == 1) return f(0, n);
  const int64_t parts = (n + grain - 1) / grain;
#pragma omp parallel num_threads(threads)
  {
    const int64_t t = omp_get_num_threads(), i = omp_get_thread_num();
    f(parts * i / t * grain, std::min(n, parts * (i + 1) / t * grain));
  }
}

void dots(const spec::Fp8GemmArgs& g, int64_t kp, int threads) {
  Shared& s = shared();
  s.wide.reserve_discard(g.m * kp);
  fp8_dots_order_codes_cpu_avx512bf16(g.qa, g.m, g.k, kp, s.wide.data());
  const spec::bf16* a = s.wide.data();
  split_rows(g.n, 1, threads, [&](int64_t n0, int64_t n1) {
    thread_local Buffer<float> scratch;
    scratch.reserve_discard(g.m * kp / spec::kFp8Block);
    Fp8Dots d;
    d.m = g.m, d.k = g.k, d.kp = kp;
    d.a = a, d.sa = g.sa, d.w = g.qb, d.sw = g.sb;
    d.c = g.c, d.ldc = g.n, d.c_type = g.c_type, d.scratch = scratch.data();
    fp8_dots_cpu_avx512bf16(d, n0, n1);
  });
}

void gemv(const spec::Fp8GemmArgs& g, int64_t kp, int threads) {
  Shared& s = shared();
  s.wide.reserve_discard(g.m * kp);
  fp8_widen_rows_avx512bf16(g.qa, g.m, g.k, kp, s.wide.data());
  const spec::bf16* a = s.wide.data();
  split_rows(g.n, 2, threads,
             [&](int64_t n0, int64_t n1) { fp8_gemv_avx512bf16(g, a, kp, n0, n1); });
}

void columns(const spec::Fp8GemmArgs& g, int threads) {
  Shared& s = shared();
  s.wide_f32.reserve_discard(g.m * g.k);
  const float* a = s.wide_f32.data();
  tile_widen_cpu_simd(g.qa, DType::f8e4m3, g.m * g.k, s.wide_f32.data());
  split_rows(g.n, 2, threads, [&](int64_t n0, int64_t n1) {
    thread_local Buffer<float> weights;
    weights.reserve_discard(2 * g.k);
    fp8_columns_cpu_simd(g, a, weights.data(), n0, n1);
  });
}

void tiles(const spec::Fp8GemmArgs& g, int threads) {
  const TileForm form = pairs() ? TileForm::pairs : TileForm::f32;
  const int64_t groups = (g.m + 15) / 16, blocks = spec::fp8_blocks(g.k);
  Shared& s = shared();
  s.packed.reserve_discard(strip_x_dwords(form, g.m, g.k));
  s.scale.reserve_discard(blocks * groups * 16);
  uint32_t* q = s.packed.data();
  float* scale = s.scale.data();
  StripX x = strip_x(form, g.m, g.k, q);
  x.scale = scale;
  PackArgs a;
  a.src = g.qa, a.type = DType::f8e4m3, a.ld = g.k, a.count = g.m, a.k = g.k, a.out = q;
  StripW w;
  w.type = DType::f8e4m3, w.w = g.qb, w.ld = g.k, w.scale = g.sb;
  const int64_t unit_groups = std::min(groups, kUnitGroups);
  const int64_t lane_units = (groups + unit_groups - 1) / unit_groups;
  const int64_t unit_rows = g.n >= 8 * threads * spec::kFp8Block ? spec::kFp8Block : 48;
  const int64_t units = (g.n + unit_rows - 1) / unit_rows * lane_units;
  const auto pack = [&](int64_t group) {
    strip_pack_x(form, a, group, group + 1);
    for (int64_t i = group * 16; i < group * 16 + 16; ++i)
      for (int64_t b = 0; b < blocks; ++b)
        scale[b * groups * 16 + i] = i < g.m ? g.sa[i * blocks + b] : 0.0F;
  };
  const auto unit = [&](int64_t i) {
    const int64_t n0 = i / lane_units * unit_rows, n1 = std::min(g.n, n0 + unit_rows);
    const int64_t g0 = i % lane_units * unit_groups, g1 = std::min(groups, g0 + unit_groups);
    thread_local Buffer<float> sums;
    const int64_t ld = (g1 - g0) * 16;
    sums.reserve_discard((n1 - n0) * ld);
    strip_lanes(x, g0, g1, w, n0, n1, sums.data(), ld, false);
    StoreArgs st;
    st.from = sums.data(), st.ld_from = ld, st.rows = n1 - n0;
    st.lanes = std::min(g.m, g1 * 16) - g0 * 16;
    st.c = static_cast<uint8_t*>(g.c) + (g0 * 16 * g.n + n0) * spec::dtype_bytes(g.c_type);
    st.ldc = g.n, st.type = g.c_type;
    tile_store_transposed(st);
  };
  if (threads == 1) {
    for (int64_t i = 0; i < groups; ++i) pack(i);
    for (int64_t i = 0; i < units; ++i) unit(i);
    return;
  }
#pragma omp parallel num_threads(threads)
  {
#pragma omp for schedule(static)
    for (int64_t i = 0; i < groups; ++i) pack(i);
#pragma omp for schedule(dynamic, 1)
    for (int64_t i = 0; i < units; ++i) unit(i);
  }
}

}  // namespace

bool fp8_gemm_avx512bf16_supported() {
  static const bool vbmi = __builtin_cpu_supports("avx512vbmi") != 0;
  return vbmi && cpu_features().avx512_bf16;
}

void fp8_gemm(const spec::Fp8GemmArgs& g) noexcept {
  if (g.m == 0 || g.n == 0) return;
  if (g.k == 0) {
    std::memset(g.c, 0, static_cast<size_t>(g.m * g.n * spec::dtype_bytes(g.c_type)));
    return;
  }
  // Widening the codes costs about as much again as reading them.
  const double weights = static_cast<double>(g.n) * static_cast<double>(g.k);
  const int threads = team_for(2 * weights, 2 * weights * static_cast<double>(g.m));
  const int64_t kp = spec::fp8_blocks(g.k) * spec::kFp8Block;
  if (pairs() && g.m <= kFp8DotsRows) return dots(g, kp, threads);
  if (pairs() && g.m <= kGemvRows) return gemv(g, kp, threads);
  if (!pairs() && g.m <= kColumnRows) return columns(g, threads);
  tiles(g, threads);
}

std::string fp8_gemm_isa(const spec::Fp8GemmArgs& g) {
  if (!pairs()) return tile_f32_isa();
  if (g.m <= kGemvRows) return "avx512_bf16+vbmi";
  return cpu_features().amx_bf16 ? isa_name(best_isa()) : "avx512_bf16+vbmi";
}

}  // namespace v3b::kern
