// Decode with MHA, GQA or MQA on a contiguous cache: the rows of a task are the heads of one
// key/value head.
#include <algorithm>
#include <vector>

#include "kernels/attention/attention.h"
#include "kernels/attention/rows.h"

namespace v3b::kern {

void attention_decode_cpu_simd(const spec::AttentionDecodeArgs& a) noexcept {
  const int64_t e = spec::dtype_bytes(a.dtype), group = a.n_h / a.n_kv,
                heads = std::min(group, kMaxRows);
  std::vector<RowsTask> tasks;
  tasks.reserve(static_cast<size_t>(a.B * a.n_kv));
  for (int64_t b = 0; b < a.B; ++b) {
    for (int64_t g = 0; g < a.n_kv; ++g) {
      for (int64_t h0 = g * group; h0 < (g + 1) * group; h0 += heads) {
        RowsTask t;
        t.R = t.inner = std::min(heads, (g + 1) * group - h0);
        t.d_qk = a.d_qk, t.d_v = a.d_v, t.scale = static_cast<float>(a.scale), t.dtype = a.dtype;
        t.empty_lse = a.empty_lse;
        t.q = static_cast<const char*>(a.q) + e * (b * a.n_h + h0) * a.d_qk;
        t.o = static_cast<char*>(a.o) + e * (b * a.n_h + h0) * a.d_v;
        t.q_inner = a.d_qk, t.o_inner = a.d_v, t.lse_inner = 1;
        if (a.lse) t.lse = a.lse + b * a.n_h + h0;
        t.keys.k1 = static_cast<const uint8_t*>(a.k) + e * (b * a.k_batch + g * a.k_head);
        t.keys.v = static_cast<const uint8_t*>(a.v) + e * (b * a.v_batch + g * a.v_head);
        t.keys.k1_stride = e * a.k_row;
        t.keys.v_stride = e * a.v_row;
        t.keys.d1 = a.d_qk;
        t.j1 = t.lim0 = a.cache_seqlens[b];
        tasks.push_back(t);
      }
    }
  }
  rows_run_split(tasks.data(), static_cast<int64_t>(tasks.size()));
}

}  // namespace v3b::kern
