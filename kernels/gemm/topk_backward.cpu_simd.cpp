#include "kernels/gemm/topk_backward.h"

#include <cstring>

#include "kernels/core/buffer.h"
#include "kernels/core/team.h"
#include "kernels/norm_rope/stream.h"
#include "kernels/norm_rope/stream_copy.h"

namespace v3b::kern {
namespace {

// Rows [lo, hi) of the exact scatter. Streamed rows are made in a row of zeros in L1, copied out, and the K gradients
// zeroed again: stores into a line that has been streamed would fetch it back. dy is asked for some rows ahead: the
// places that are read are known, and no other lines of it are needed.
void scatter(const spec::TopkBackwardArgs& a, int64_t lo, int64_t hi, bool stream) {
  constexpr int64_t kRowsAhead = 8;
  const size_t row_bytes = static_cast<size_t>(a.E) * sizeof(float);
  Buffer<float> zeros(stream ? a.E : 0);
  for (int64_t t = lo; t < hi; ++t) {
    const int32_t* idx = a.idx + t * a.K;
    const float* dy = a.dy + t * a.E;
    float* ds = a.ds + t * a.E;
    if (t + kRowsAhead < hi)
      for (int64_t k = 0; k < a.K; ++k)
        __builtin_prefetch(dy + kRowsAhead * a.E + idx[kRowsAhead * a.K + k]);
    float* row = stream ? zeros.data() : ds;
    if (!stream) std::memset(ds, 0, row_bytes);
    for (int64_t k = 0; k < a.K; ++k) row[idx[k]] = dy[idx[k]];
    if (!stream) continue;
    copy_past_caches(ds, row, static_cast<int64_t>(row_bytes), row);
    for (int64_t k = 0; k < a.K; ++k) row[idx[k]] = 0;
  }
}

}  // namespace

void topk_backward_cpu_simd(const spec::TopkBackwardArgs& a) noexcept {
  const int64_t row_bytes = a.E * static_cast<int64_t>(sizeof(float));
  const int threads = team_for((a.ste ? 2.0 : 1.0) * static_cast<double>(a.T * row_bytes), 0);
  const bool stream =
      a.ds != a.dy && stream_output(a.T * row_bytes) && line_aligned(a.ds, row_bytes);
  for_spans(a.T, threads, [&](int64_t lo, int64_t hi) {
    if (!a.ste) {
      scatter(a, lo, hi, stream);
    } else if (stream) {
      copy_past_caches(a.ds + lo * a.E, a.dy + lo * a.E, (hi - lo) * row_bytes, nullptr);
    } else {
      std::memcpy(a.ds + lo * a.E, a.dy + lo * a.E, static_cast<size_t>((hi - lo) * row_bytes));
    }
    if (stream) end_streaming();
  });
}

}  // namespace v3b::kern
