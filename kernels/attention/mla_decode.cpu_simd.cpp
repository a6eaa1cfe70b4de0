// Absorbed MLA decode: the rows of a task are all heads and queries of one sequence (MQA with one
// latent key).
#include <algorithm>
#include <vector>

#include "kernels/attention/attention.h"
#include "kernels/attention/rows.h"

namespace v3b::kern {

void mla_decode_cpu_simd(const spec::MlaDecodeArgs& a) noexcept {
  const int64_t e = spec::dtype_bytes(a.dtype), d = a.d_c + a.d_r;
  const int64_t row_bytes = spec::mla_cache_row_bytes(a.kv_format, a.dtype, a.d_c, a.d_r);
  const int64_t heads = std::min(a.n_h, kMaxRows), queries = std::max<int64_t>(1, kMaxRows / heads);
  std::vector<RowsTask> tasks;
  for (int64_t b = 0; b < a.B; ++b) {
    for (int64_t i0 = 0; i0 < a.s_q; i0 += queries) {
      for (int64_t h0 = 0; h0 < a.n_h; h0 += heads) {
        const int64_t n = std::min(queries, a.s_q - i0);
        RowsTask t;
        t.inner = std::min(heads, a.n_h - h0);
        t.R = n * t.inner;
        t.d_qk = d, t.d_v = a.d_c, t.scale = static_cast<float>(a.scale), t.dtype = a.dtype;
        t.empty_lse = a.empty_lse;
        const int64_t row = (b * a.s_q + i0) * a.n_h + h0;
        t.q = static_cast<const char*>(a.q) + e * row * d;
        t.o = static_cast<char*>(a.out) + e * row * a.d_c;
        t.q_outer = a.n_h * d, t.q_inner = d, t.o_outer = a.n_h * a.d_c, t.o_inner = a.d_c;
        if (a.lse) t.lse = a.lse + (b * a.n_h + h0) * a.s_q + i0;
        t.lse_outer = 1, t.lse_inner = a.s_q;
        t.keys.k1 = static_cast<const uint8_t*>(a.cache);
        t.keys.k1_stride = row_bytes;
        t.keys.record = a.kv_format != spec::KvFormat::bf16;
        t.keys.d1 = t.keys.record ? a.d_c : d;
        t.keys.d2 = t.keys.record ? a.d_r : 0;
        t.keys.table = a.block_table + b * a.max_blocks;
        t.keys.page = a.page;
        const int64_t seqlen = a.cache_seqlens[b];
        t.lim0 = seqlen - a.s_q + i0 + 1;
        t.j0 = 0;
        t.j1 = std::max<int64_t>(0, std::min(seqlen, t.lim0 + n - 1));
        tasks.push_back(t);
      }
    }
  }
  rows_run_split(tasks.data(), static_cast<int64_t>(tasks.size()));
}

}  // namespace v3b::kern
