// Routed and shared experts on packed weights (packed_experts.h), in one parallel region. Phase 1: units (block of an
// expert's rows, groups of its hidden units) make silu(gate) * up; the thread that ends a block's last unit packs its
// hidden rows. Barrier. Phase 2: units (tokens, groups of outputs) run over all experts and sum up in fp32, expert by
// expert, the shared one last: every output is made by one thread, in one order. Input rows are packed before, by one
// thread where they are few (no barrier).
//
// Bound: 3*d*m*e bytes an expert, each read once as linear streams of 16 outputs, up to 9-11 rows at bf16 (4 at FP8)
// on the machine of kernels/notes/moe.md; the matrix rate above. Block and unit sizes follow from the problem alone, so
// that the bits do not depend on the team; only who computes a unit does. A thread takes its own contiguous share of
// every matrix first (the pages that it wrote in PackedExperts::pack), then what others have left; units shrink towards
// the end, so that nobody waits long at the barrier. Nothing is allocated once the scratch has seen the largest call.
#include <omp.h>

#include <algorithm>
#include <atomic>
#include <cstring>

#include "kernels/core/shares.h"
#include "kernels/moe/moe_rows.h"
#include "kernels/moe/moe_scratch.h"
#include "kernels/moe/packed_experts.h"

namespace v3b::kern {
namespace {

using spec::DType;
using Impl = MoeScratch::Impl;
using Plan = PackedPlan;

constexpr int64_t kBlockRows = 256;       // rows a unit: results of six groups are 96 KiB
constexpr int64_t kTokens = 4096;         // phase 2: tokens a unit, fewer where outputs are few
constexpr int64_t kSerialPack = 1 << 16;  // elements that one thread packs before the region
constexpr int64_t kTile = 3;              // groups of outputs that a product takes at a time

int64_t round_up(int64_t x, int64_t to) { return (x + to - 1) / to * to; }

struct Call {
  const spec::MoeExpertsArgs& a;
  const PackedExperts& w;
  Impl& s;
  Plan& p;
  DType rows_type;       // of hidden rows in memory
  int64_t chunk = 1;     // tokens
  int64_t max_rows = 0;  // of a block
  int64_t block_floats = 0, thread_bytes = 0;
};

// Groups of the next unit where `left` groups remain: a sixty-fourth of them, so that the last units are small, in
// whole tiles of the products.
int64_t unit_groups(int64_t left) {
  return std::clamp(left / 64 / kTile * kTile, kTile, 2 * kTile);
}

void plan_blocks(Call& c) {
  const auto& a = c.a;
  Plan& p = c.p;
  c.s.plan(a.T, a.K, a.E, a.idx);
  const auto& slot = c.s.slot;
  p.jobs.clear();
  p.blocks.clear();
  for (int64_t e = 0; e < a.E; ++e)
    if (const int64_t first = c.s.offsets[e], rows = c.s.offsets[e + 1] - first; rows > 0)
      p.jobs.push_back({e, a.m, first, rows});
  if (a.shared_m > 0) p.jobs.push_back({a.E, a.shared_m, -1, a.T});
  p.token.resize(slot.size());
  for (size_t i = 0; i < slot.size(); ++i) p.token[i] = static_cast<int32_t>(slot[i] / a.K);

  const int64_t step = packed_rows_chunk(), most = std::max(step, kBlockRows / step * step);
  int64_t x = 0, hidden = 0, packed = 0;
  for (size_t j = 0; j < p.jobs.size(); ++j) {
    const Plan::Job& job = p.jobs[j];
    const int32_t* tokens = job.first < 0 ? nullptr : p.token.data() + job.first;
    const auto token = [&](int64_t r) { return tokens == nullptr ? r : tokens[r]; };
    for (int64_t r = 0, end; r < job.rows; r = end) {
      const int64_t at = token(r) / c.chunk;
      end = r + 1;
      while (end < job.rows && end - r < most && token(end) / c.chunk == at) ++end;
      Plan::Block b{.job = static_cast<int64_t>(j), .r0 = r, .rows = end - r, .chunk = at};
      b.token0 = token(end - 1) - token(r) == b.rows - 1 ? token(r) : -1;
      b.x_at = x;
      bool shares = false;
      for (const auto& o : p.blocks)  // the same tokens for another expert
        if (!shares && b.token0 >= 0 && o.token0 == b.token0 && o.rows == b.rows)
          b.x_at = o.x_at, shares = true;
      if (!shares) x += round_up(packed_rows_dwords(a.w_dtype, b.rows, a.d), 16);
      b.hidden_at = hidden;
      hidden += b.rows * job.m;
      b.packed_at = packed;
      packed += round_up(packed_rows_dwords(a.w_dtype, b.rows, job.m), 16);
      c.max_rows = std::max(c.max_rows, b.rows);
      if (!shares)
        for (int64_t i = 0; i < b.rows; i += 4 * step)
          p.packs.push_back({static_cast<int32_t>(p.blocks.size()), static_cast<int32_t>(i),
                             static_cast<int32_t>(std::min(b.rows, i + 4 * step))});
      p.blocks.push_back(b);
    }
  }
  p.x.reserve_discard(x);
  p.hidden.reserve_discard(hidden * spec::dtype_bytes(c.rows_type));
  p.hidden_packed.reserve_discard(packed);
}

void plan_units(Call& c) {
  const auto& a = c.a;
  Plan& p = c.p;
  int64_t left = 0, most = 1;
  for (const auto& b : p.blocks) left += packed_groups(p.jobs[b.job].m);
  p.hidden_units.clear();
  p.job_units.clear();
  p.left.assign(p.blocks.size(), 0);
  for (size_t b0 = 0, b1; b0 < p.blocks.size(); b0 = b1) {
    const int64_t j = p.blocks[b0].job, groups = packed_groups(p.jobs[j].m);
    for (b1 = b0; b1 < p.blocks.size() && p.blocks[b1].job == j; ++b1) {
    }
    p.job_units.push_back(static_cast<int64_t>(p.hidden_units.size()));
    const int64_t blocks = static_cast<int64_t>(b1 - b0);
    for (int64_t g0 = 0, g1; g0 < groups; g0 = g1) {
      g1 = std::min(groups, g0 + unit_groups(left));
      left -= (g1 - g0) * blocks;
      most = std::max(most, g1 - g0);
      for (size_t b = b0; b < b1; ++b) {
        ++p.left[b];
        p.hidden_units.push_back(
            {static_cast<int32_t>(b), static_cast<int32_t>(g0), static_cast<int32_t>(g1)});
      }
    }
  }
  p.job_units.push_back(static_cast<int64_t>(p.hidden_units.size()));

  const int64_t groups = packed_groups(a.d), chunks = (a.T + c.chunk - 1) / c.chunk;
  left = groups * chunks;
  p.output_units.clear();
  for (int64_t t = 0; t < chunks; ++t)
    for (int64_t g0 = 0, g1; g0 < groups; g0 = g1) {
      g1 = std::min(groups, g0 + unit_groups(left));
      left -= g1 - g0;
      most = std::max(most, g1 - g0);
      p.output_units.push_back(
          {static_cast<int32_t>(t), static_cast<int32_t>(g0), static_cast<int32_t>(g1)});
    }
  c.block_floats = c.max_rows * most * 16;
  c.thread_bytes = round_up((2 * c.block_floats + c.chunk * most * 16) * 4, 64);
}

// Each thread's share of every job's hidden units, one after another.
void plan_order(Call& c, int threads) {
  Plan& p = c.p;
  const int parts = Shares::parts_of(threads);
  p.order.clear();
  p.order_begin.clear();
  for (int t = 0; t < parts; ++t) {
    p.order_begin.push_back(static_cast<int64_t>(p.order.size()));
    for (size_t j = 0; j + 1 < p.job_units.size(); ++j) {
      const int64_t u0 = p.job_units[j], n = p.job_units[j + 1] - u0;
      for (int64_t u = Shares::first(n, t, parts); u < Shares::first(n, t + 1, parts); ++u)
        p.order.push_back(static_cast<int32_t>(u0 + u));
    }
  }
  p.order_begin.push_back(static_cast<int64_t>(p.order.size()));
  p.per_thread.reserve_discard(c.thread_bytes * threads);
}

void pack_input(const Call& c, const Plan::Pack& k) {
  const auto& a = c.a;
  const Plan::Block& b = c.p.blocks[k.block];
  RowsSource src{.type = a.x_dtype, .x = a.x, .ld = a.d, .m = b.rows, .k = a.d};
  if (b.token0 < 0)
    src.index = c.p.token.data() + c.p.jobs[b.job].first + b.r0;
  else
    src.x = static_cast<const std::byte*>(a.x) + b.token0 * a.d * spec::dtype_bytes(a.x_dtype);
  pack_rows(a.w_dtype, src, c.p.x.data() + b.x_at, k.r0, k.r1);
}

// silu(gate) * up of one unit into the block's hidden rows.
void hidden_unit(const Call& c, const Plan::Unit& u, std::byte* mine) {
  Plan& p = c.p;
  const Plan::Block& b = p.blocks[u.of];
  const Plan::Job& job = p.jobs[b.job];
  const auto& w = c.w.expert(job.expert);
  const int64_t ld = (u.g1 - u.g0) * 16, n0 = u.g0 * 16, n = std::min(job.m - n0, ld),
                bytes = spec::dtype_bytes(c.rows_type);
  float *gate = reinterpret_cast<float*>(mine), *up = gate + c.block_floats;
  const PackedRows x{.m = b.rows, .k = c.a.d, .data = p.x.data() + b.x_at};
  packed_product(w.gate, x, u.g0, u.g1, gate, ld, false);
  packed_product(w.up, x, u.g0, u.g1, up, ld, false);
  std::byte* hidden = p.hidden.data() + b.hidden_at * bytes;
  for (int64_t i = 0; i < b.rows; ++i)
    moe_swiglu_row(gate + i * ld, up + i * ld, n, c.rows_type == DType::bf16, false,
                   hidden + (i * job.m + n0) * bytes);
  if (std::atomic_ref<int32_t>(p.left[u.of]).fetch_sub(1, std::memory_order_acq_rel) > 1) return;
  const RowsSource src{.type = c.rows_type, .x = hidden, .ld = job.m, .m = b.rows, .k = job.m};
  pack_rows(c.a.w_dtype, src, p.hidden_packed.data() + b.packed_at, 0, b.rows);
}

// Outputs of groups [g0, g1) for a chunk of tokens.
void output_unit(const Call& c, const Plan::Unit& u, std::byte* mine) {
  const auto& a = c.a;
  const Plan& p = c.p;
  const int64_t t0 = u.of * c.chunk, t1 = std::min(a.T, t0 + c.chunk), ld = (u.g1 - u.g0) * 16,
                n0 = u.g0 * 16, n = std::min(a.d - n0, ld);
  const bool in_bf16 = a.moe_accum == spec::MoeAccum::bf16;
  float *out = reinterpret_cast<float*>(mine), *sum = out + 2 * c.block_floats;
  std::memset(sum, 0, static_cast<size_t>((t1 - t0) * ld) * 4);
  for (const Plan::Block& b : p.blocks) {
    if (b.chunk != u.of) continue;
    const Plan::Job& job = p.jobs[b.job];
    const PackedRows x{.m = b.rows, .k = job.m, .data = p.hidden_packed.data() + b.packed_at};
    packed_product(c.w.expert(job.expert).down, x, u.g0, u.g1, out, ld, false);
    for (int64_t i = 0; i < b.rows; ++i) {
      const int64_t r = b.r0 + i, token = job.first < 0 ? r : p.token[job.first + r];
      moe_add_row(in_bf16, out + i * ld, job.first < 0 ? 1.0F : a.weight[c.s.slot[job.first + r]],
                  n, sum + (token - t0) * ld);
    }
  }
  const bool bf16 = a.x_dtype == DType::bf16;
  for (int64_t t = t0; t < t1; ++t)
    moe_put_row(sum + (t - t0) * ld, n, bf16,
                static_cast<std::byte*>(a.y) + (t * a.d + n0) * (bf16 ? 2 : 4));
}

}  // namespace

const char* moe_experts_cpu_packed_isa(DType x, DType w) noexcept { return packed_isa(x, w); }

void moe_experts_cpu_packed(const spec::MoeExpertsArgs& a, const PackedExperts& w,
                            MoeScratch& scratch) noexcept {
  if (a.T == 0 || a.d == 0) return;
  Impl& s = *scratch.impl();
  Call c{.a = a, .w = w, .s = s, .p = s.packed, .rows_type = a.x_dtype};
  // Enough units of outputs for a team where d is small.
  c.chunk = std::min(a.T, kTokens);
  while (c.chunk > kBlockRows && (a.T + c.chunk - 1) / c.chunk * packed_groups(a.d) < 48 * kTile)
    c.chunk = round_up(c.chunk / 2, 8);
  c.p.packs.clear();
  plan_blocks(c);
  plan_units(c);
  const int threads = experts_team(a, c.p.jobs);
  plan_order(c, threads);
  Plan& p = s.packed;
  int64_t rows = 0;
  for (const auto& k : p.packs) rows += k.r1 - k.r0;
  const bool alone = threads == 1 || rows * a.d <= kSerialPack;
  if (alone)
    for (const auto& k : p.packs) pack_input(c, k);
  Shares hidden(p.order_begin.data(), threads);
  Shares outputs(static_cast<int64_t>(p.output_units.size()), threads);
#pragma omp parallel num_threads(threads)
  {
    // In a region of one thread inside another team, too, the first scratch is this call's.
    const int me = threads > 1 ? omp_get_thread_num() : 0;
    std::byte* mine = p.per_thread.data() + c.thread_bytes * me;
    if (!alone) {
      const int64_t packs = static_cast<int64_t>(p.packs.size());
#pragma omp for schedule(dynamic, 1)
      for (int64_t k = 0; k < packs; ++k) pack_input(c, p.packs[k]);
    }
    hidden.run(me, [&](int64_t u) { hidden_unit(c, p.hidden_units[p.order[u]], mine); });
#pragma omp barrier
    outputs.run(me, [&](int64_t u) { output_unit(c, p.output_units[u], mine); });
  }
}

}  // namespace v3b::kern
