// Causal prefill: tasks of up to 256 rows (queries of one head, or of the heads of one key/value
// head).
#include <algorithm>

#include "kernels/attention/attention.h"
#include "kernels/attention/rows.h"
#include "kernels/core/team.h"

namespace v3b::kern {
namespace {

// Runs `proto` for every key/value head and block of queries; set_head(task, kv head) points it at
// its keys.
template <class SetHead>
void run_prefill(int64_t T, int64_t s0, int64_t n_h, int64_t n_kv, const RowsTask& proto,
                 const SetHead& set_head) {
  const int64_t group = n_h / n_kv;                 // heads that share keys
  const int64_t heads = std::min(group, kMaxRows);  // of them in one task
  const int64_t tokens =
      std::max<int64_t>(1, std::min(kMaxRows / heads, (T + 1) / 2 < 64 ? T : kMaxRows / heads));
  const int64_t head_parts = (group + heads - 1) / heads, blocks = (T + tokens - 1) / tokens;
  const int64_t tasks = n_kv * head_parts * blocks, e = spec::dtype_bytes(proto.dtype);
  RowsTask all = proto;  // every row against half of the new keys and all old ones
  all.R = T * n_h;
  all.j1 = s0 + (T + 1) / 2;
  const RowsWork work = rows_work(all);
  const int threads = team_for(work.bytes, work.flop);
#pragma omp parallel for schedule(dynamic) num_threads(threads)
  for (int64_t i = 0; i < tasks; ++i) {
    const int64_t block = blocks - 1 - i / (n_kv * head_parts);  // the longest first
    const int64_t g = i % (n_kv * head_parts) / head_parts, part = i % head_parts;
    const int64_t t0 = block * tokens, n = std::min(tokens, T - t0);
    const int64_t h0 = g * group + part * heads;
    RowsTask t = proto;
    t.inner = std::min(heads, (g + 1) * group - h0);
    t.R = n * t.inner;
    t.q_inner = t.d_qk;
    t.o_inner = t.d_v;
    t.lse_outer = n_h;
    t.lse_inner = 1;
    t.q = static_cast<const char*>(t.q) + e * (t0 * t.q_outer + h0 * t.d_qk);
    t.o = static_cast<char*>(t.o) + e * (t0 * t.o_outer + h0 * t.d_v);
    if (t.lse) t.lse += t0 * n_h + h0;
    t.lim0 = s0 + t0 + 1;
    t.j0 = 0;
    t.j1 = std::max<int64_t>(0, s0 + t0 + n);
    set_head(t, g);
    rows_run(t);
  }
}
}  // namespace

void attention_prefill_cpu_simd(const spec::AttentionArgs& a) noexcept {
  const int64_t e = spec::dtype_bytes(a.dtype);
  RowsTask t;
  t.d_qk = a.d_qk, t.d_v = a.d_v, t.scale = static_cast<float>(a.scale), t.dtype = a.dtype,
  t.empty_lse = a.empty_lse;
  t.q = a.q, t.o = a.o, t.lse = a.lse, t.q_outer = a.q_stride, t.o_outer = a.o_stride;
  t.keys.d1 = a.d_qk;
  t.keys.k1_stride = a.k_stride * e;
  t.keys.v_stride = a.v_stride * e;
  run_prefill(a.T, a.s0, a.n_h, a.n_kv, t, [&](RowsTask& task, int64_t g) {
    task.keys.k1 = static_cast<const uint8_t*>(a.k) + g * a.d_qk * e;
    task.keys.v = static_cast<const uint8_t*>(a.v) + g * a.d_v * e;
  });
}

void mla_prefill_cpu_simd(const spec::MlaPrefillArgs& a) noexcept {
  const int64_t e = spec::dtype_bytes(a.dtype);
  RowsTask t;
  t.d_qk = a.d_n + a.d_r, t.d_v = a.d_v, t.scale = static_cast<float>(a.scale), t.dtype = a.dtype;
  t.q = a.q, t.o = a.o, t.lse = a.lse, t.q_outer = a.q_stride, t.o_outer = a.o_stride;
  t.keys.d1 = a.d_n;
  t.keys.d2 = a.d_r;
  t.keys.k1_stride = t.keys.v_stride = a.kv_stride * e;
  t.keys.k2 = static_cast<const uint8_t*>(a.k_pe);
  t.keys.k2_stride = a.k_pe_stride * e;
  run_prefill(a.T, a.s0, a.n_h, a.n_h, t, [&](RowsTask& task, int64_t h) {
    task.keys.k1 = static_cast<const uint8_t*>(a.kv) + h * (a.d_n + a.d_v) * e;
    task.keys.v = task.keys.k1 + a.d_n * e;
  });
}

const char* attention_cpu_simd_isa(spec::DType dtype) noexcept {
  return rows_isa(dtype == spec::DType::bf16);
}

}  // namespace v3b::kern
