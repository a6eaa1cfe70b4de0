// Routed and shared experts in one parallel region. Phase 1: units (expert, block of its hidden
// columns, rows) make silu(gate) * up; phase 2: units (tokens, block of output columns) run over
// all experts and sum up in fp32, expert by expert, the shared one last, so every output is made by
// one thread in one order whatever the thread count. Units are handed out dynamically: unequal
// loads and disturbed cores even out.
//
// Few rows: the weights (3*d*m*e bytes an expert) stream through once, read bandwidth is the roof;
// the region with its three barriers costs a few microseconds. Many rows: blocks of 128 columns x
// 256 rows through the GEMM, the matrix rate is the roof. Nothing is allocated once the scratch has
// seen the largest call.
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/moe/moe_experts.cpu_simd.cpp"
#include "hwy/foreach_target.h"  // IWYU pragma: keep
//
#include <omp.h>

#include <algorithm>
#include <cstring>

#include "hwy/contrib/math/math-inl.h"
#include "hwy/highway.h"
#include "kernels/core/cpu.h"
#include "kernels/core/team.h"
#include "kernels/moe/moe.h"
#include "kernels/moe/moe_product.h"
#include "kernels/moe/moe_scratch.h"
#include "kernels/norm_rope/hwy_io-inl.h"

HWY_BEFORE_NAMESPACE();
namespace v3b::kern::HWY_NAMESPACE {
namespace {

HWY_INLINE VF silu_mul(DF df, VF a, VF u) {
  // exp(-a) is capped: a very negative a gives -0 or a denormal, never a / inf * u = NaN.
  const VF e = hn::Exp(df, hn::Min(hn::Neg(a), hn::Set(df, 88.0F)));
  return hn::Mul(hn::Div(a, hn::Add(hn::Set(df, 1.0F), e)), u);
}

// out[i] = silu(gate[i]) * up[i], i < n. round: to bf16 although out is f32.
template <class Y>
void swiglu_row(const float* gate, const float* up, int64_t n, bool round, Y* out) {
  const DF df;
  const int64_t lanes = static_cast<int64_t>(hn::Lanes(df));
  int64_t i = 0;
  for (; i + lanes <= n; i += lanes) {
    const VF h = silu_mul(df, hn::LoadU(df, gate + i), hn::LoadU(df, up + i));
    store(df, round ? round_bf16(df, h) : h, out + i);
  }
  if (i == n) return;
  const size_t tail = static_cast<size_t>(n - i);
  const VF h = silu_mul(df, load_tail(df, gate + i, tail), load_tail(df, up + i, tail));
  store_tail(df, round ? round_bf16(df, h) : h, out + i, tail);
}
void swiglu_to(const float* gate, const float* up, int64_t n, bool to_bf16, bool round, void* out) {
  if (to_bf16) return swiglu_row(gate, up, n, false, static_cast<uint16_t*>(out));
  swiglu_row(gate, up, n, round, static_cast<float*>(out));
}

void add_scaled(const float* o, float w, int64_t n, float* y) {
  const DF df;
  const int64_t lanes = static_cast<int64_t>(hn::Lanes(df));
  const VF vw = hn::Set(df, w);
  int64_t i = 0;
  for (; i + lanes <= n; i += lanes)
    hn::StoreU(hn::MulAdd(vw, hn::LoadU(df, o + i), hn::LoadU(df, y + i)), df, y + i);
  for (; i < n; ++i) y[i] += w * o[i];
}

// y = bf16(y + bf16(w * bf16(o))), all in fp32 containers: moe_accum=bf16.
void add_scaled_bf16(const float* o, float w, int64_t n, float* y) {
  const DF df;
  const int64_t lanes = static_cast<int64_t>(hn::Lanes(df));
  const VF vw = hn::Set(df, w);
  const auto next = [&](VF vo, VF vy) {
    return round_bf16(df, hn::Add(vy, round_bf16(df, hn::Mul(vw, round_bf16(df, vo)))));
  };
  int64_t i = 0;
  for (; i + lanes <= n; i += lanes)
    hn::StoreU(next(hn::LoadU(df, o + i), hn::LoadU(df, y + i)), df, y + i);
  if (i == n) return;
  const size_t tail = static_cast<size_t>(n - i);
  store_tail(df, next(load_tail(df, o + i, tail), load_tail(df, y + i, tail)), y + i, tail);
}
void add_row(bool bf16, const float* o, float w, int64_t n, float* y) {
  if (bf16) return add_scaled_bf16(o, w, n, y);
  add_scaled(o, w, n, y);
}

void put_row(const float* y, int64_t n, bool to_bf16, void* out) {
  if (!to_bf16) {
    std::memcpy(out, y, static_cast<size_t>(n) * 4);
    return;
  }
  const DF df;
  const int64_t lanes = static_cast<int64_t>(hn::Lanes(df));
  auto* o = static_cast<uint16_t*>(out);
  int64_t i = 0;
  for (; i + lanes <= n; i += lanes) store(df, hn::LoadU(df, y + i), o + i);
  if (i < n)
    store_tail(df, load_tail(df, y + i, static_cast<size_t>(n - i)), o + i,
               static_cast<size_t>(n - i));
}

const char* moe_target() { return hwy::TargetName(HWY_TARGET); }

}  // namespace
}  // namespace v3b::kern::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace v3b::kern {
namespace {
HWY_EXPORT(swiglu_to);
HWY_EXPORT(add_row);
HWY_EXPORT(put_row);
HWY_EXPORT(moe_target);

using spec::DType;
using Impl = MoeScratch::Impl;

constexpr int64_t kFewRows = 12;    // streaming products up to here (gemv_takes, fp8 gemv)
constexpr int64_t kBigBlock = 128;  // columns a unit with many rows; FP8 scale blocks are 128 too
// Narrow products, SwiGLU and scattered rows: the experts run at about half the rate of one product.
constexpr double kExpertFactor = 2;

int64_t pow2_floor(int64_t x) {
  int64_t p = 1;
  while (2 * p <= x) p *= 2;
  return p;
}

// Everything one call needs beside the scratch.
struct Call {
  const spec::MoeExpertsArgs& a;
  Impl& s;
  MoeProduct product;
  int64_t lda, row_bytes;  // of input rows in the products' form
  const std::byte* x;      // [T, lda]
  bool gather = false;
  int64_t chunk, chunks, out_block, out_blocks;  // phase 2: tokens and columns a unit
  int64_t thread_stride, block_bytes;
};

// x in the products' form: itself, padded, or widened.
void prepare_x(Call& c) {
  const auto& a = c.a;
  const DType rows = c.product.row_dtype();
  c.lda = c.product.row_stride(a.d);
  c.row_bytes = c.lda * spec::dtype_bytes(rows);
  c.x = static_cast<const std::byte*>(a.x);
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

// Jobs and phase-1 units. An expert whose tokens lie one after another reads x in place.
void plan_jobs(Call& c) {
  const auto& a = c.a;
  Impl& s = c.s;
  s.plan(a.T, a.K, a.E, a.idx);
  s.jobs.clear();
  int64_t hidden = 0, columns = 0;
  const auto add = [&](const spec::FfnPointers& w, int64_t m, int64_t first, int64_t rows,
                       const std::byte* in) {
    s.jobs.push_back({&w, m, first, rows, in, hidden});
    hidden += rows * c.product.row_stride(m);
    columns += m;
  };
  for (int64_t e = 0; e < a.E; ++e) {
    const int64_t first = s.offsets[e], rows = s.offsets[e + 1] - first;
    if (rows == 0) continue;
    const int64_t t0 = s.slot[first] / a.K;
    bool direct = true;
    for (int64_t i = 1; i < rows && direct; ++i) direct = s.slot[first + i] / a.K == t0 + i;
    c.gather |= !direct;
    add(a.experts[e], a.m, first, rows, direct ? c.x + t0 * c.row_bytes : nullptr);
  }
  if (a.shared_m > 0) add(a.shared, a.shared_m, -1, a.T, c.x);
  s.hidden.reserve_discard(hidden * spec::dtype_bytes(c.product.row_dtype()));
  if (c.gather) {
    s.gathered.reserve_discard(s.offsets[a.E] * c.row_bytes);
    for (auto& j : s.jobs)
      if (j.a == nullptr) j.a = s.gathered.data() + j.first * c.row_bytes;
  }
  // Block sizes follow from the problem alone, not from the team: the same bits on any thread
  // count.
  const int64_t few = std::clamp<int64_t>(pow2_floor(columns / 24 + 1), 8, 64);
  const int64_t many = columns >= 16 * kBigBlock ? kBigBlock : kBigBlock / 2;
  s.units.clear();
  for (size_t j = 0; j < s.jobs.size(); ++j) {
    const auto& job = s.jobs[j];
    const int64_t nb = job.rows <= kFewRows ? few : many;
    for (int64_t n = 0; n < job.m; n += nb)
      for (int64_t r = 0; r < job.rows; r += kMoeRowChunk)
        s.units.push_back({static_cast<int32_t>(j), static_cast<int32_t>(n),
                           static_cast<int32_t>(std::min(job.m, n + nb)), static_cast<int32_t>(r),
                           static_cast<int32_t>(std::min(job.rows, r + kMoeRowChunk))});
  }
}

void plan_output(Call& c) {
  const auto& a = c.a;
  Impl& s = c.s;
  const int64_t team = num_threads();
  int64_t most = 0, max_k = a.d;
  for (const auto& j : s.jobs) {
    most = std::max(most, j.rows);
    max_k = std::max(max_k, j.m);
  }
  // Enough tokens together that an average expert gets a block's worth of rows from them.
  c.chunk = std::min(a.T, std::max<int64_t>(kMoeRowChunk, 32 * a.E / std::max<int64_t>(1, a.K)));
  c.chunks = (a.T + c.chunk - 1) / c.chunk;
  const int64_t share = pow2_floor(a.d * c.chunks / 16 + 1);
  c.out_block = most <= kFewRows ? std::clamp<int64_t>(share, 8, 64)
                                 : std::clamp<int64_t>(share, 64, kBigBlock);
  c.out_blocks = (a.d + c.out_block - 1) / c.out_block;
  c.block_bytes = std::min(most, kMoeRowChunk) * kBigBlock * 4;
  c.thread_stride = 2 * c.block_bytes + c.chunk * c.out_block * 4 + c.product.scratch_bytes(max_k);
  c.thread_stride = (c.thread_stride + 127) / 64 * 64;
  s.per_thread.reserve_discard(c.thread_stride * team);
  if (c.product.path != MoePath::fp8) return;
  const int64_t need = kMoeRowChunk * ((max_k + 127) / 128), have = s.ones.size();
  if (need > have) {
    s.ones.reserve_discard(need);
    std::fill(s.ones.begin(), s.ones.end(), 1.0F);
  }
  c.product.ones = s.ones.data();
}

// silu(gate) * up of one unit into the job's hidden rows.
void hidden_unit(const Call& c, const Impl::Unit& u, std::byte* mine) {
  const Impl::Job& job = c.s.jobs[u.job];
  const DType row = c.product.row_dtype();
  const int64_t n = u.n1 - u.n0, rows = u.r1 - u.r0, stride = c.product.row_stride(job.m);
  float *gate = reinterpret_cast<float*>(mine),
        *up = reinterpret_cast<float*>(mine + c.block_bytes);
  void* scratch = mine + 2 * c.block_bytes;
  const std::byte* in = job.a + u.r0 * c.row_bytes;
  c.product.run(rows, c.a.d, in, job.w->gate, job.w->gate_scale, u.n0, u.n1, gate, scratch);
  c.product.run(rows, c.a.d, in, job.w->up, job.w->up_scale, u.n0, u.n1, up, scratch);
  const bool round = c.a.x_dtype == DType::bf16;
  const int64_t bytes = spec::dtype_bytes(row);
  for (int64_t i = 0; i < rows; ++i) {
    std::byte* h = c.s.hidden.data() + (job.hidden_at + (u.r0 + i) * stride) * bytes;
    HWY_DYNAMIC_DISPATCH(swiglu_to)
    (gate + i * n, up + i * n, n, row == DType::bf16, round, h + u.n0 * bytes);
    if (u.n1 == job.m && stride > job.m)
      std::memset(h + job.m * bytes, 0, static_cast<size_t>((stride - job.m) * bytes));
  }
}

// Columns [n0, n1) of y for tokens [t0, t1).
void output_unit(const Call& c, int64_t t0, int64_t t1, int64_t n0, int64_t n1, std::byte* mine) {
  const auto& a = c.a;
  const Impl& s = c.s;
  const int64_t n = n1 - n0, bytes = spec::dtype_bytes(c.product.row_dtype());
  float* out = reinterpret_cast<float*>(mine);
  void* scratch = mine + 2 * c.block_bytes;
  float* sum =
      reinterpret_cast<float*>(mine + c.thread_stride - (c.chunk * c.out_block * 4 + 63) / 64 * 64);
  std::memset(sum, 0, static_cast<size_t>((t1 - t0) * n) * 4);
  for (const Impl::Job& job : s.jobs) {
    const int64_t* slot = job.first < 0 ? nullptr : s.slot.data() + job.first;
    int64_t r0 = t0, r1 = t1;
    if (slot != nullptr) {
      r0 = c.chunks == 1 ? 0 : std::lower_bound(slot, slot + job.rows, t0 * a.K) - slot;
      r1 = c.chunks == 1 ? job.rows : std::lower_bound(slot + r0, slot + job.rows, t1 * a.K) - slot;
    }
    const int64_t stride = c.product.row_stride(job.m);
    for (int64_t r = r0; r < r1; r += kMoeRowChunk) {
      const int64_t rows = std::min(kMoeRowChunk, r1 - r);
      c.product.run(rows, job.m, s.hidden.data() + (job.hidden_at + r * stride) * bytes,
                    job.w->down, job.w->down_scale, n0, n1, out, scratch);
      for (int64_t i = 0; i < rows; ++i) {
        const int64_t t = slot == nullptr ? r + i : slot[r + i] / a.K;
        HWY_DYNAMIC_DISPATCH(add_row)
        (a.moe_accum == spec::MoeAccum::bf16, out + i * n,
         slot == nullptr ? 1.0F : a.weight[slot[r + i]], n, sum + (t - t0) * n);
      }
    }
  }
  const bool bf16 = a.x_dtype == DType::bf16;
  for (int64_t t = t0; t < t1; ++t) HWY_DYNAMIC_DISPATCH(put_row)
  (sum + (t - t0) * n, n, bf16, static_cast<std::byte*>(a.y) + (t * a.d + n0) * (bf16 ? 2 : 4));
}

// Threads for all of it. Where this says one, every product in it is smaller still, so its GEMM
// forms no team of its own either.
int threads_for(const Call& c) {
  double bytes = 0, flop = 0;
  for (const auto& j : c.s.jobs) {
    const double weights = 3.0 * static_cast<double>(c.a.d) * static_cast<double>(j.m);
    bytes += weights * static_cast<double>(spec::dtype_bytes(c.a.w_dtype));
    bytes += static_cast<double>(j.rows) * static_cast<double>(c.a.d + 3 * j.m) * 4;
    flop += 2 * weights * static_cast<double>(j.rows);
  }
  return team_for(kExpertFactor * bytes, kExpertFactor * flop);
}

}  // namespace

const char* moe_experts_cpu_simd_isa() noexcept { return HWY_DYNAMIC_DISPATCH(moe_target)(); }

void moe_experts_cpu_simd(const spec::MoeExpertsArgs& a, MoeScratch& scratch) noexcept {
  if (a.T == 0 || a.d == 0) return;
  Impl& s = *scratch.impl();
  Call c{.a = a, .s = s, .product = {moe_path(a.x_dtype, a.w_dtype), a.x_dtype, a.w_dtype}};
  prepare_x(c);
  plan_jobs(c);
  plan_output(c);
  const int64_t units = static_cast<int64_t>(s.units.size()), outputs = c.chunks * c.out_blocks;
  const int threads = threads_for(c);
#pragma omp parallel num_threads(threads)
  {
    // In a region of one thread inside another team, too, the first scratch is this call's.
    const int me = threads > 1 ? omp_get_thread_num() : 0;
    std::byte* mine = s.per_thread.data() + c.thread_stride * me;
    if (c.gather) {
#pragma omp for schedule(static)
      for (int64_t r = 0; r < s.offsets[a.E]; ++r)
        std::memcpy(s.gathered.data() + r * c.row_bytes, c.x + s.slot[r] / a.K * c.row_bytes,
                    static_cast<size_t>(c.row_bytes));
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
#endif  // HWY_ONCE
