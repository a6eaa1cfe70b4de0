// gemm(): few rows stream the weights once as dot products (gemv.h); everything else is tiles (strip.h). Which operand
// fills the lanes is a matter of cost: C^T = W X^T packs only the activations and transposes C on the way out, C = X W^T
// packs W and stores C directly (training: thousands of rows against small matrices).
#include "kernels/gemm/gemm.h"

#include <omp.h>

#include <algorithm>
#include <cstring>

#include "kernels/core/buffer.h"
#include "kernels/core/cpu.h"
#include "kernels/core/team.h"
#include "kernels/gemm/gemv.h"
#include "kernels/gemm/packed_many.h"
#include "kernels/gemm/strip.h"

namespace v3b::kern {
namespace {

using spec::DType;

constexpr int64_t kUnitRows = 96, kUnitGroups = 32;  // 96 x 512 sums: 192 KiB of L2
constexpr int64_t kEarlyPack = 128 << 10;            // elements, about 10 us
constexpr int64_t kPackGroups = 4;                   // lanes packed at a time

void* at(const void* p, int64_t elements, DType t) {
  return const_cast<uint8_t*>(static_cast<const uint8_t*>(p)) + elements * spec::dtype_bytes(t);
}

void zero_c(const GemmArgs& g) {
  for (int64_t i = 0; i < g.M; ++i)
    std::memset(at(g.c, i * g.ldc, g.c_type), 0,
                static_cast<size_t>(g.N * spec::dtype_bytes(g.c_type)));
}

// One product, planned: which side fills the lanes, and its packed form.
struct Plan {
  const GemmArgs& g;
  TileForm form;
  bool lanes_are_m;
  StripX x;
  StripW w;
  int64_t rows, unit_rows, groups, unit_groups, row_units, lane_units;

  Plan(const GemmArgs& args, int threads) : g(args), form(tile_form(args.ab_type, args.ab_type)) {
    lanes_are_m = cost(true) <= cost(false);
    const int64_t lanes = lanes_are_m ? g.M : g.N;
    rows = lanes_are_m ? g.N : g.M;
    x.form = form, x.m = lanes, x.k = g.K, x.q_group = tile_group(form, g.K);
    w.type = g.ab_type;
    if (lanes_are_m) {
      w.w = g.b, w.ld = g.ldb, w.k_major = !g.trans_b;
    } else {
      w.w = g.a, w.ld = g.lda, w.k_major = g.trans_a;
    }
    groups = (lanes + 15) / 16;
    unit_rows = kUnitRows, unit_groups = kUnitGroups;
    // At least four units a thread, so that a disturbed core costs little. Rows that each unit packs for itself are
    // split as long as they fill the pack, lanes only then.
    const int64_t least_rows = w.k_major ? 64 : 24, least_groups = w.k_major ? 12 : 4;
    while (threads > 1 && count() < 4 * threads &&
           (unit_rows > least_rows || unit_groups > least_groups)) {
      const bool split_rows =
          unit_rows > least_rows && (w.k_major || unit_rows >= unit_groups * 32);
      if (split_rows || unit_groups <= least_groups) {
        unit_rows = std::max(least_rows, unit_rows / 2);
      } else {
        unit_groups = std::max(least_groups, std::min(unit_groups, groups) / 2);
      }
    }
    count();
  }
  int64_t count() {
    row_units = (rows + unit_rows - 1) / unit_rows;
    lane_units = (groups + unit_groups - 1) / unit_groups;
    return row_units * lane_units;
  }
  // Cycles of one core, roughly: products, packing, storing.
  double cost(bool m_lanes) const {
    const double m = static_cast<double>(g.M), n = static_cast<double>(g.N),
                 k = static_cast<double>(g.K);
    const double lanes = m_lanes ? m : n, others = m_lanes ? n : m;
    const bool lanes_k_major = m_lanes ? g.trans_a : !g.trans_b,
               rows_k_major = m_lanes ? !g.trans_b : g.trans_a;
    const double padded = 16.0 * static_cast<double>((static_cast<int64_t>(lanes) + 15) / 16);
    const double products =
        padded * others * k / (form == TileForm::pairs ? 32 : 16) * (padded <= 16 ? 1.5 : 1);
    const double pack =
        lanes * k * (lanes_k_major ? 0.15 : 0.3) + (rows_k_major ? others * k * 0.15 : 0);
    const double store = m * n * (m_lanes ? 0.6 : g.c_type == DType::f32 ? 0.1 : 0.3);
    return products + pack + store;
  }
  void pack(uint32_t* q, int64_t g0, int64_t g1) const {
    PackArgs a;
    a.type = g.ab_type, a.k = g.K, a.count = x.m, a.out = q;
    if (lanes_are_m) {
      a.src = g.a, a.ld = g.lda, a.k_major = g.trans_a;
    } else {
      a.src = g.b, a.ld = g.ldb, a.k_major = !g.trans_b;
    }
    strip_pack_x(form, a, g0, g1);
  }
  void unit(const StripX& packed, int64_t i) const {
    const int64_t r0 = i / lane_units * unit_rows, r1 = std::min(rows, r0 + unit_rows);
    const int64_t g0 = i % lane_units * unit_groups, g1 = std::min(groups, g0 + unit_groups);
    const int64_t l0 = g0 * 16, lanes = std::min(x.m, g1 * 16) - l0;
    if (!lanes_are_m && g.c_type == DType::f32) {
      return strip_lanes(packed, g0, g1, w, r0, r1, static_cast<float*>(g.c) + r0 * g.ldc + l0,
                         g.ldc, g.accumulate);
    }
    thread_local Buffer<float> sums;
    const int64_t ld = (g1 - g0) * 16;
    sums.reserve_discard((r1 - r0) * ld);
    strip_lanes(packed, g0, g1, w, r0, r1, sums.data(), ld, false);
    if (lanes_are_m) {
      StoreArgs s;
      s.from = sums.data(), s.ld_from = ld, s.rows = r1 - r0, s.lanes = lanes;
      s.c = at(g.c, l0 * g.ldc + r0, g.c_type), s.ldc = g.ldc, s.type = g.c_type,
      s.accumulate = g.accumulate;
      return tile_store_transposed(s);
    }
    for (int64_t r = r0; r < r1; ++r)
      convert_f32_to_bf16(sums.data() + (r - r0) * ld,
                          static_cast<spec::bf16*>(g.c) + r * g.ldc + l0, lanes);
  }
};

void product(const GemmArgs& g, int threads) {
  Plan p(g, threads);
  thread_local Buffer<uint32_t> packed;
  packed.reserve_discard(strip_x_dwords(p.form, p.x.m, g.K));
  uint32_t* q = packed.data();
  StripX x = p.x;
  x.q = q;
  const int64_t units = p.count(), packs = (p.groups + kPackGroups - 1) / kPackGroups;
  if (threads == 1) {
    p.pack(q, 0, p.groups);
    for (int64_t i = 0; i < units; ++i) p.unit(x, i);
    return;
  }
  // A small pack is done before the team wakes: one barrier less.
  const bool early = x.m * g.K <= kEarlyPack;
  if (early) p.pack(q, 0, p.groups);
#pragma omp parallel num_threads(threads)
  {
    if (!early)
#pragma omp for schedule(static)
      for (int64_t i = 0; i < packs; ++i)
        p.pack(q, i * kPackGroups, std::min(p.groups, (i + 1) * kPackGroups));
#pragma omp for schedule(dynamic, 1)
    for (int64_t i = 0; i < units; ++i) p.unit(x, i);
  }
}

void one(const GemmArgs& g, int threads) {
  if (g.M == 0 || g.N == 0) return;
  if (g.K == 0) {
    if (!g.accumulate) zero_c(g);
    return;
  }
  if (gemv_takes(g)) return gemv(g);
  if (gemm_many(g, threads)) return;
  product(g, threads);
}

}  // namespace

void gemm_batched(const GemmArgs& g, int64_t count, int64_t stride_a, int64_t stride_b,
                  int64_t stride_c) noexcept {
  if (count == 0 || g.M == 0 || g.N == 0) return;
  const double m = static_cast<double>(g.M), n = static_cast<double>(g.N),
               k = static_cast<double>(g.K), problems = static_cast<double>(count);
  const double bytes =
      problems * ((m * k + k * n) * static_cast<double>(spec::dtype_bytes(g.ab_type)) +
                  m * n * static_cast<double>(spec::dtype_bytes(g.c_type)));
  const int threads = team_for(bytes, 2 * m * n * k * problems);
  const auto problem = [&](int64_t i) {
    GemmArgs p = g;
    p.a = at(g.a, i * stride_a, g.ab_type), p.b = at(g.b, i * stride_b, g.ab_type);
    p.c = at(g.c, i * stride_c, g.c_type);
    return p;
  };
  if (threads == 1 || count < threads) {
    for (int64_t i = 0; i < count; ++i) one(problem(i), threads);
    return;
  }
  // A problem a thread: inside the region gemv() and team_for() see one thread.
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads)
  for (int64_t i = 0; i < count; ++i) one(problem(i), 1);
}

void gemm(const GemmArgs& g) noexcept { gemm_batched(g, 1, 0, 0, 0); }

std::string gemm_isa(const GemmArgs& g) {
  if (gemv_takes(g)) return gemv_isa(g.ab_type);
  return tile_form(g.ab_type, g.ab_type) == TileForm::f32 ? tile_f32_isa() : isa_name(best_isa());
}

}  // namespace v3b::kern
