// Causal prefill on the rows engine: tasks of up to 256 rows (queries of one head, or of the heads
// of one key/value head). Shared by attention_prefill and mla_prefill.
#pragma once
#include <algorithm>

#include "kernels/attention/rows.h"
#include "kernels/core/team.h"

namespace v3b::kern {

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

}  // namespace v3b::kern
