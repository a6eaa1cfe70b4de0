// Absorbed MLA decode composed of oneDNN products over chunks of the cache: gather, S = Q K^T,
// online softmax, O += P C. Baseline.
#include <algorithm>

#include "kernels/attention/attention.h"
#include "kernels/attention/rows.h"
#include "kernels/attention/softmax_block.h"
#include "kernels/core/buffer.h"
#include "kernels/gemm/gemm.h"

namespace v3b::kern {
namespace {
constexpr int64_t kChunk = 1024;  // keys: the gathered chunk (1.2 MB) and its scores stay in L2/L3
}

void mla_decode_cpu_onednn(const spec::MlaDecodeArgs& a) noexcept {
  const int64_t e = spec::dtype_bytes(a.dtype), d = a.d_c + a.d_r, R = a.s_q * a.n_h;
  static thread_local Buffer<float> s_buffer, o_buffer, state;
  static thread_local Buffer<uint8_t> p_buffer, k_buffer;
  s_buffer.reserve_discard(R * kChunk);
  p_buffer.reserve_discard(R * kChunk * e);
  k_buffer.reserve_discard(kChunk * d * e);
  o_buffer.reserve_discard(R * a.d_c);
  state.reserve_discard(2 * R);
  float *const s = s_buffer.data(), *const o = o_buffer.data(), *const m = state.data(),
               *const l = m + R;
  uint8_t *const p = p_buffer.data(), *const k = k_buffer.data();

  KeySource keys;
  keys.k1 = static_cast<const uint8_t*>(a.cache);
  keys.k1_stride = spec::mla_cache_row_bytes(a.kv_format, a.dtype, a.d_c, a.d_r);
  keys.record = a.kv_format != spec::KvFormat::bf16;
  keys.d1 = keys.record ? a.d_c : d;
  keys.d2 = keys.record ? a.d_r : 0;
  keys.page = a.page;
  for (int64_t b = 0; b < a.B; ++b) {
    const int64_t seqlen = a.cache_seqlens[b];
    keys.table = a.block_table + b * a.max_blocks;
    std::fill_n(o, R * a.d_c, 0.0f);
    std::fill_n(m, R, -std::numeric_limits<float>::infinity());
    std::fill_n(l, R, 0.0f);
    for (int64_t j = 0; j < seqlen; j += kChunk) {
      const int64_t n = std::min(kChunk, seqlen - j);
#pragma omp parallel for schedule(static)
      for (int64_t i = 0; i < n; i += 64)
        rows_fetch(keys, j + i, std::min<int64_t>(64, n - i), a.dtype, k + i * d * e, d * e);
      GemmArgs g;
      g.M = R, g.N = n, g.K = d;
      g.a = static_cast<const uint8_t*>(a.q) + b * R * d * e, g.lda = d;
      g.b = k, g.ldb = d;
      g.c = s, g.ldc = kChunk;
      g.ab_type = a.dtype;
      gemm_onednn(g);
#pragma omp parallel for schedule(static)
      for (int64_t r = 0; r < R; ++r) {
        const int64_t visible = std::clamp<int64_t>(seqlen - a.s_q + r / a.n_h + 1 - j, 0, n);
        const float alpha = softmax_row(s + r * kChunk, n, visible, log2_scale(a.scale), a.dtype,
                                        p + r * kChunk * e, m[r], l[r]);
        for (int64_t c = 0; c < a.d_c; ++c) o[r * a.d_c + c] *= alpha;
      }
      GemmArgs v;
      v.M = R, v.N = a.d_c, v.K = n;
      v.a = p, v.lda = kChunk;
      v.b = k, v.ldb = d, v.trans_b = false;
      v.c = o, v.ldc = a.d_c;
      v.ab_type = a.dtype;
      v.accumulate = true;
      gemm_onednn(v);
    }
#pragma omp parallel for schedule(static)
    for (int64_t r = 0; r < R; ++r) {
      const float lse = finish_softmax_row(o + r * a.d_c, a.d_c, m[r], l[r], a.dtype,
                                           static_cast<uint8_t*>(a.out) + (b * R + r) * a.d_c * e,
                                           empty_lse_of(a.empty_lse));
      if (a.lse) a.lse[(b * a.n_h + r % a.n_h) * a.s_q + r / a.n_h] = lse;
    }
  }
}

}  // namespace v3b::kern
