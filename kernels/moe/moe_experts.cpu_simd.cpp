// Routed and shared experts in one parallel region. Phase 0: input rows are gathered, packed where
// an expert has many. Phase 1: units (expert, block of its hidden columns, rows) make silu(gate) *
// up; phase 2: units (tokens, block of output columns) run over all experts and sum up in fp32,
// expert by expert, the shared one last, so every output is made by one thread in one order whatever
// the thread count. Units are handed out dynamically: unequal loads and disturbed cores even out.
//
// Few rows: dot products on the weights as they lie (3*d*m*e bytes an expert); read bandwidth is the
// roof, and the matrix rate from about 9 rows a bf16 byte pair on (kernels/notes/moe.md). Many rows:
// strips of weight rows against packed rows (gemm/strip.h), transposed, so that SwiGLU writes the
// packed operand of the down product directly; the matrix rate is the roof. Nothing is allocated
// once the scratch has seen the largest call.
#include <omp.h>

#include <algorithm>
#include <cstring>

#include "kernels/core/cpu.h"
#include "kernels/gemm/strip.h"
#include "kernels/moe/moe.h"
#include "kernels/moe/moe_product.h"
#include "kernels/moe/moe_rows.h"
#include "kernels/moe/moe_scratch.h"

namespace v3b::kern {
namespace {

using spec::DType;
using Impl = MoeScratch::Impl;

constexpr int64_t kLanes = 256;     // rows a unit of strips: two blocks of 96 x 256 floats in L2
constexpr int64_t kPackGroups = 4;  // groups of 16 rows packed at a time
constexpr int64_t kTokens = 4096;   // phase 2: tokens a unit

int64_t pow2_floor(int64_t x) {
  int64_t p = 1;
  while (2 * p <= x) p *= 2;
  return p;
}
int64_t round_up(int64_t x, int64_t to) { return (x + to - 1) / to * to; }

// Everything one call needs beside the scratch.
struct Call {
  const spec::MoeExpertsArgs& a;
  Impl& s;
  MoeProduct product;                            // few rows
  TileForm form;                                 // many
  int64_t lda, row_bytes;                        // of input rows in the products' form
  const std::byte* x;                            // [T, lda]
  int64_t few_block, many_block;                 // phase 1: columns a unit
  int64_t chunk, chunks, out_block, out_blocks;  // phase 2: tokens and columns a unit
  int64_t thread_stride, block_bytes;
};

// x in the form of the products of few rows: itself, padded, or widened.
void prepare_x(Call& c) {
  const auto& a = c.a;
  const DType rows = c.product.row_dtype();
  if (c.lda == a.d && rows == a.x_dtype) return;
  c.s.x_copy.reserve_discard(a.T * c.row_bytes);
  const int64_t from = a.d * spec::dtype_bytes(a.x_dtype);
  for (int64_t t = 0; t < a.T; ++t) {
    std::byte* to = c.s.x_copy.data() + t * c.row_bytes;
    if (rows == a.x_dtype) {
      std::memcpy(to, c.x + t * from, static_cast<size_t>(from));
      std::memset(to + from, 0, static_cast<size_t>(c.row_bytes - from));
    } else {  // rows are f32, x is bf16
      const auto* src = reinterpret_cast<const spec::bf16*>(c.x + t * from);
      for (int64_t i = 0; i < a.d; ++i) reinterpret_cast<float*>(to)[i] = spec::to_float(src[i]);
    }
  }
  c.x = c.s.x_copy.data();
}

// Jobs in the experts' order. Few rows: tokens that lie one after another are read in x itself. Many
// rows: every expert that takes all tokens shares one packed copy.
void plan_jobs(Call& c) {
  const auto& a = c.a;
  Impl& s = c.s;
  s.plan(a.T, a.K, a.E, a.idx);
  s.jobs.clear();
  // Packed rows cannot be cut by tokens.
  const int64_t few =
      a.T <= kTokens ? c.product.few_rows() : std::min<int64_t>(2, c.product.few_rows());
  c.lda = c.product.row_stride(a.d);
  c.row_bytes = c.lda * spec::dtype_bytes(c.product.row_dtype());
  c.x = static_cast<const std::byte*>(a.x);
  bool any_few = false;
  for (int64_t e = 0; e < a.E; ++e) {
    const int64_t rows = s.offsets[e + 1] - s.offsets[e];
    any_few |= rows > 0 && rows <= few;
  }
  any_few |= a.shared_m > 0 && a.T <= few;
  if (any_few) prepare_x(c);

  int64_t hidden = 0, gathered = 0, packed_hidden = 0, packed = 0, all_at = -1;
  const auto add = [&](const spec::FfnPointers& w, int64_t m, int64_t first, int64_t rows) {
    const int64_t t0 = first < 0 ? 0 : s.slot[first] / a.K;
    bool direct = true;
    for (int64_t i = 1; i < rows && direct && first >= 0; ++i)
      direct = s.slot[first + i] / a.K == t0 + i;
    Impl::Job j{.w = &w, .m = m, .first = first, .rows = rows};
    j.few = rows <= few;
    if (j.few) {
      j.rows_packed = c.product.packs(rows);
      if (direct && !j.rows_packed) {
        j.a = c.x + t0 * c.row_bytes;
      } else {
        j.gather_at = gathered;
        gathered += rows * (j.rows_packed ? round_up(a.d, 32) * 2 : c.row_bytes);
      }
      j.hidden_at = hidden;
      hidden += rows * (j.rows_packed ? round_up(m, 32) : c.product.row_stride(m));
    } else {
      j.hidden_at = packed_hidden;
      packed_hidden += strip_x_dwords(c.form, rows, m);
      j.token0 = direct ? t0 : -1;
      const bool all = direct && rows == a.T;
      j.packs = !all || all_at < 0;
      j.packed_at = j.packs ? packed : all_at;
      if (j.packs) packed += strip_x_dwords(c.form, rows, a.d);
      if (all) all_at = j.packed_at;
    }
    s.jobs.push_back(j);
  };
  for (int64_t e = 0; e < a.E; ++e)
    if (s.offsets[e + 1] > s.offsets[e])
      add(a.experts[e], a.m, s.offsets[e], s.offsets[e + 1] - s.offsets[e]);
  if (a.shared_m > 0) add(a.shared, a.shared_m, -1, a.T);
  s.hidden.reserve_discard(hidden * spec::dtype_bytes(c.product.row_dtype()));
  s.packed_hidden.reserve_discard(packed_hidden);
  s.packed_x.reserve_discard(packed);
  if (packed > 0) {
    s.token.resize(s.slot.size());
    for (size_t i = 0; i < s.slot.size(); ++i) s.token[i] = static_cast<int32_t>(s.slot[i] / a.K);
  }
  s.gathered.reserve_discard(gathered);
  for (auto& j : s.jobs)
    if (j.gather_at >= 0) j.a = s.gathered.data() + j.gather_at;
}

// Block sizes follow from the problem alone, not from the team: the same bits on any thread count.
// Strips of 96 rows are whole tiles of 6, 8, 12; FP8 scales are of 128.
void plan_units(Call& c) {
  Impl& s = c.s;
  int64_t columns = 0;
  for (const auto& j : s.jobs) columns += j.m * ((j.rows + kLanes - 1) / kLanes);
  const int64_t big = c.a.w_dtype == DType::f8e4m3 ? 128 : 96;
  // The dot kernels take 24 weight rows at a time, FP8's two.
  const bool dots = c.product.packs(1);
  c.few_block = !dots                ? std::clamp<int64_t>(pow2_floor(columns / 24 + 1), 8, 64)
                : columns >= 24 * 48 ? 48
                : columns >= 12 * 24 ? 24
                                     : 8;
  c.many_block = columns >= 16 * big ? big : big / 2;
  s.units.clear();
  s.packs.clear();
  s.gathers.clear();
  const auto unit = [](size_t j, int64_t n0, int64_t n1, int64_t r0, int64_t r1) {
    return Impl::Unit{static_cast<int32_t>(j), static_cast<int32_t>(n0), static_cast<int32_t>(n1),
                      static_cast<int32_t>(r0), static_cast<int32_t>(r1)};
  };
  for (size_t j = 0; j < s.jobs.size(); ++j) {
    const auto& job = s.jobs[j];
    const int64_t nb = job.few ? c.few_block : c.many_block, groups = (job.rows + 15) / 16;
    if (!job.few && job.packs)
      for (int64_t g = 0; g < groups; g += kPackGroups)
        s.packs.push_back(unit(j, 0, 0, g, std::min(groups, g + kPackGroups)));
    for (int64_t r = 0; r < job.rows && job.gather_at >= 0; ++r)
      s.gathers.push_back(unit(j, 0, 0, r, r + 1));
    for (int64_t n = 0; n < job.m; n += nb)
      for (int64_t r = 0; r < job.rows; r += kLanes)
        s.units.push_back(unit(j, n, std::min(job.m, n + nb), r, std::min(job.rows, r + kLanes)));
  }
}

void plan_output(Call& c) {
  const auto& a = c.a;
  Impl& s = c.s;
  int64_t max_k = a.d, block = 0;
  bool strips = false;
  for (const auto& j : s.jobs) {
    max_k = std::max(max_k, j.m);
    strips |= !j.few;
    block = std::max(block, j.few ? j.rows * 128 : kLanes * c.many_block);
  }
  c.chunk = std::min(a.T, kTokens);
  c.chunks = (a.T + c.chunk - 1) / c.chunk;
  const int64_t share = a.d * c.chunks / 16;
  const int64_t big = a.w_dtype == DType::f8e4m3 ? 128 : 96;
  if (strips)
    c.out_block = share >= big ? big : big / 2;
  else if (c.product.packs(1))
    c.out_block = share >= 48 ? 48 : share >= 24 ? 24 : 8;
  else
    c.out_block = std::clamp<int64_t>(pow2_floor(share + 1), 8, 64);
  c.out_blocks = (a.d + c.out_block - 1) / c.out_block;
  c.block_bytes = round_up(std::max(block, strips ? kLanes * c.out_block : 0) * 4, 64);
  c.thread_stride = 2 * c.block_bytes + round_up(c.chunk * c.out_block * 4, 64) +
                    c.product.scratch_bytes(max_k) + 64;
  c.thread_stride = round_up(c.thread_stride, 64);
  s.per_thread.reserve_discard(c.thread_stride * num_threads());
  if (c.product.path != MoePath::fp8) return;
  const int64_t need = 16 * ((max_k + 127) / 128), have = s.ones.size();
  if (need > have) {
    s.ones.reserve_discard(need);
    std::fill(s.ones.begin(), s.ones.end(), 1.0F);
  }
  c.product.ones = s.ones.data();
}

void gather_row(const Call& c, const Impl::Unit& u) {
  const Impl::Job& job = c.s.jobs[u.job];
  const int64_t r = u.r0, t = job.first < 0 ? r : c.s.slot[job.first + r] / c.a.K;
  const std::byte* from = c.x + t * c.row_bytes;
  std::byte* to = c.s.gathered.data() + job.gather_at;
  if (!job.rows_packed) {
    std::memcpy(to + r * c.row_bytes, from, static_cast<size_t>(c.row_bytes));
    return;
  }
  for (int64_t k = 0; k < c.row_bytes; k += 64) {  // 32 elements
    std::byte* part = to + k * job.rows + r * 64;
    const int64_t bytes = std::min<int64_t>(64, c.row_bytes - k);
    std::memcpy(part, from + k, static_cast<size_t>(bytes));
    std::memset(part + bytes, 0, static_cast<size_t>(64 - bytes));
  }
}

void pack_unit(const Call& c, const Impl::Unit& u) {
  const Impl::Job& job = c.s.jobs[u.job];
  PackArgs p;
  p.type = c.a.x_dtype, p.ld = c.a.d, p.count = job.rows, p.k = c.a.d;
  p.src = c.a.x;
  if (job.token0 < 0)
    p.index = c.s.token.data() + job.first;
  else
    p.src =
        static_cast<const std::byte*>(c.a.x) + job.token0 * c.a.d * spec::dtype_bytes(c.a.x_dtype);
  p.out = c.s.packed_x.data() + job.packed_at;
  strip_pack_x(c.form, p, u.r0, u.r1);
}

// silu(gate) * up of one unit into the job's hidden rows.
void hidden_unit(const Call& c, const Impl::Unit& u, std::byte* mine) {
  const Impl::Job& job = c.s.jobs[u.job];
  const int64_t n = u.n1 - u.n0, rows = u.r1 - u.r0;
  const bool round = c.a.x_dtype == DType::bf16;
  float *gate = reinterpret_cast<float*>(mine),
        *up = reinterpret_cast<float*>(mine + c.block_bytes);
  if (!job.few) {
    const StripX x = strip_x(c.form, job.rows, c.a.d, c.s.packed_x.data() + job.packed_at);
    const int64_t g0 = u.r0 / 16, g1 = (u.r1 + 15) / 16, ld = (g1 - g0) * 16;
    StripW w{.type = c.a.w_dtype, .w = job.w->gate, .ld = c.a.d, .scale = job.w->gate_scale};
    strip_lanes(x, g0, g1, w, u.n0, u.n1, gate, ld, false);
    w.w = job.w->up, w.scale = job.w->up_scale;
    strip_lanes(x, g0, g1, w, u.n0, u.n1, up, ld, false);
    const bool pairs = c.form == TileForm::pairs;
    const int64_t each = pairs ? 2 : 1, group = tile_group(c.form, job.m);
    const int64_t end = u.n1 == job.m ? tile_steps(c.form, job.m) : u.n1 / each;
    moe_swiglu_lanes(gate, up, ld, n, rows, pairs, round,
                     c.s.packed_hidden.data() + job.hidden_at + g0 * group + u.n0 / each * 16,
                     group, end - u.n0 / each);
    return;
  }
  const DType row = c.product.row_dtype();
  const int64_t stride = c.product.row_stride(job.m), bytes = spec::dtype_bytes(row);
  void* scratch = mine + 2 * c.block_bytes;
  const std::byte* in = job.a + u.r0 * c.row_bytes;
  c.product.run(rows, c.a.d, in, job.w->gate, job.w->gate_scale, u.n0, u.n1, gate, scratch);
  c.product.run(rows, c.a.d, in, job.w->up, job.w->up_scale, u.n0, u.n1, up, scratch);
  if (job.rows_packed) {  // 32 columns of a row lie together
    auto* h = reinterpret_cast<uint16_t*>(c.s.hidden.data()) + job.hidden_at;
    for (int64_t n0 = u.n0; n0 < u.n1;) {
      const int64_t n1 = std::min<int64_t>(u.n1, (n0 / 32 + 1) * 32), at = n0 - u.n0;
      for (int64_t i = 0; i < rows; ++i) {
        uint16_t* to = h + (n0 / 32 * rows + i) * 32 + n0 % 32;
        moe_swiglu_row(gate + i * n + at, up + i * n + at, n1 - n0, true, round, to);
        if (n1 == job.m) std::fill(to + (n1 - n0), to + (32 - n0 % 32), uint16_t{0});
      }
      n0 = n1;
    }
    return;
  }
  for (int64_t i = 0; i < rows; ++i) {
    std::byte* h = c.s.hidden.data() + (job.hidden_at + (u.r0 + i) * stride) * bytes;
    moe_swiglu_row(gate + i * n, up + i * n, n, row == DType::bf16, round, h + u.n0 * bytes);
    if (u.n1 == job.m && stride > job.m)
      std::memset(h + job.m * bytes, 0, static_cast<size_t>((stride - job.m) * bytes));
  }
}

// Down products of rows [r0, r1) of a job for columns [n0, n1), each row handed to add(row, values).
template <class Add>
void down_rows(const Call& c, const Impl::Job& job, int64_t r0, int64_t r1, int64_t n0, int64_t n1,
               std::byte* mine, const Add& add) {
  const int64_t n = n1 - n0;
  float *out = reinterpret_cast<float*>(mine),
        *turned = reinterpret_cast<float*>(mine + c.block_bytes);
  if (job.few) {
    const int64_t stride = c.product.row_stride(job.m),
                  bytes = spec::dtype_bytes(c.product.row_dtype());
    if (r0 >= r1) return;
    const int64_t first = job.hidden_at + r0 * stride;  // packed rows are all in this range: r0 = 0
    c.product.run(r1 - r0, job.m, c.s.hidden.data() + first * bytes, job.w->down, job.w->down_scale,
                  n0, n1, out, mine + 2 * c.block_bytes);
    for (int64_t r = r0; r < r1; ++r) add(r, out + (r - r0) * n);
    return;
  }
  const StripX x = strip_x(c.form, job.rows, job.m, c.s.packed_hidden.data() + job.hidden_at);
  const StripW w{.type = c.a.w_dtype, .w = job.w->down, .ld = job.m, .scale = job.w->down_scale};
  for (int64_t r = r0; r < r1;) {
    const int64_t g0 = r / 16, g1 = std::min((r1 + 15) / 16, g0 + kLanes / 16),
                  end = std::min(r1, g1 * 16), ld = (g1 - g0) * 16;
    strip_lanes(x, g0, g1, w, n0, n1, turned, ld, false);
    tile_store_transposed(
        {.from = turned, .ld_from = ld, .rows = n, .lanes = end - g0 * 16, .c = out, .ldc = n});
    for (; r < end; ++r) add(r, out + (r - g0 * 16) * n);
  }
}

// Columns [n0, n1) of y for tokens [t0, t1).
void output_unit(const Call& c, int64_t t0, int64_t t1, int64_t n0, int64_t n1, std::byte* mine) {
  const auto& a = c.a;
  const Impl& s = c.s;
  const int64_t n = n1 - n0;
  const bool in_bf16 = a.moe_accum == spec::MoeAccum::bf16;
  float* sum =
      reinterpret_cast<float*>(mine + c.thread_stride - round_up(c.chunk * c.out_block * 4, 64));
  std::memset(sum, 0, static_cast<size_t>((t1 - t0) * n) * 4);
  for (const Impl::Job& job : s.jobs) {
    if (job.first < 0) {
      down_rows(c, job, t0, t1, n0, n1, mine, [&](int64_t r, const float* v) {
        moe_add_row(in_bf16, v, 1.0F, n, sum + (r - t0) * n);
      });
      continue;
    }
    const int64_t* slot = s.slot.data() + job.first;
    int64_t r0 = 0, r1 = job.rows;
    if (c.chunks > 1) {
      r0 = std::lower_bound(slot, slot + job.rows, t0 * a.K) - slot;
      r1 = std::lower_bound(slot + r0, slot + job.rows, t1 * a.K) - slot;
    }
    down_rows(c, job, r0, r1, n0, n1, mine, [&](int64_t r, const float* v) {
      moe_add_row(in_bf16, v, a.weight[slot[r]], n, sum + (slot[r] / a.K - t0) * n);
    });
  }
  const bool bf16 = a.x_dtype == DType::bf16;
  for (int64_t t = t0; t < t1; ++t)
    moe_put_row(sum + (t - t0) * n, n, bf16,
                static_cast<std::byte*>(a.y) + (t * a.d + n0) * (bf16 ? 2 : 4));
}

}  // namespace

const char* moe_experts_cpu_simd_isa(DType x, DType w) noexcept {
  return tile_form(x, w) == TileForm::pairs ? isa_name(best_isa()) : moe_rows_isa();
}

void moe_experts_cpu_simd(const spec::MoeExpertsArgs& a, MoeScratch& scratch) noexcept {
  if (a.T == 0 || a.d == 0) return;
  Impl& s = *scratch.impl();
  Call c{.a = a,
         .s = s,
         .product = {moe_path(a.x_dtype, a.w_dtype), a.x_dtype, a.w_dtype},
         .form = tile_form(a.x_dtype, a.w_dtype)};
  plan_jobs(c);
  plan_units(c);
  plan_output(c);
  const int64_t gathers = static_cast<int64_t>(s.gathers.size()),
                packs = static_cast<int64_t>(s.packs.size()),
                units = static_cast<int64_t>(s.units.size()), outputs = c.chunks * c.out_blocks;
  const int threads = experts_team(a, s.jobs);
#pragma omp parallel num_threads(threads)
  {
    // In a region of one thread inside another team, too, the first scratch is this call's.
    const int me = threads > 1 ? omp_get_thread_num() : 0;
    std::byte* mine = s.per_thread.data() + c.thread_stride * me;
    if (gathers > 0) {
#pragma omp for schedule(static)
      for (int64_t u = 0; u < gathers; ++u) gather_row(c, s.gathers[u]);
    }
    if (packs > 0) {
#pragma omp for schedule(dynamic, 1)
      for (int64_t u = 0; u < packs; ++u) pack_unit(c, s.packs[u]);
    }
#pragma omp for schedule(dynamic, 1)
    for (int64_t u = 0; u < units; ++u) hidden_unit(c, s.units[u], mine);
#pragma omp for schedule(dynamic, 1) nowait
    for (int64_t u = 0; u < outputs; ++u) {
      const int64_t t0 = u / c.out_blocks * c.chunk, n0 = u % c.out_blocks * c.out_block;
      output_unit(c, t0, std::min(a.T, t0 + c.chunk), n0, std::min(a.d, n0 + c.out_block), mine);
    }
  }
}

}  // namespace v3b::kern
