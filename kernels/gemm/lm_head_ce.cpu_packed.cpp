// See lm_head_ce.h; the head's weight packed (packed_ops.h). Units are ranges of the vocabulary, the same for any number
// of threads; each has states of its own, merged in order at the end. Within a unit some 512 KiB of weights at a time give
// logits [T, outputs] that stay in L2 and are folded at once.
#include "kernels/gemm/lm_head_ce.h"

#include <omp.h>

#include <algorithm>

#include "kernels/core/shares.h"
#include "kernels/core/team.h"
#include "kernels/gemm/lse_state.h"
#include "kernels/gemm/packed_ops.h"

namespace v3b::kern {
namespace {

constexpr int64_t kUnits = 256;
constexpr int64_t kRowBlock = 512;

}  // namespace

PackedMatrix lm_head_pack(const spec::LmHeadCeArgs& a) {
  PackSource s;
  s.type = a.dtype, s.w = a.w, s.ld = a.d, s.n = a.V, s.k = a.d;
  return PackedMatrix(s);
}

void lm_head_ce_cpu_packed(const spec::LmHeadCeArgs& a, const PackedWeight& w) noexcept {
  if (a.T == 0) return;
  thread_local Buffer<uint32_t> rows;
  thread_local Buffer<LseState> states;
  const int64_t groups = packed_groups(a.V), piece = packed_unit(w, a.T, 1);
  const int64_t unit = std::max(piece, (groups / kUnits + piece - 1) / piece * piece);
  const int64_t units = (groups + unit - 1) / unit;
  const int64_t row_dwords = packed_rows_dwords(w.type, 1, a.d);
  rows.reserve_discard(a.T * row_dwords);
  states.reserve_discard(units * a.T);
  uint32_t* packed = rows.data();
  LseState* state = states.data();
  const double weights = static_cast<double>(a.V) * static_cast<double>(a.d),
               t = static_cast<double>(a.T);
  const int threads = team_for(weights * static_cast<double>(spec::dtype_bytes(a.dtype)),
                               2 * weights * t + 100 * static_cast<double>(a.V) * t);
  RowsSource x;
  x.type = a.dtype, x.x = a.h, x.ld = a.d, x.m = a.T, x.k = a.d;
  const auto fold = [&](int64_t u) {
    thread_local Buffer<float> logits;
    logits.reserve_discard(std::min(a.T, kRowBlock) * piece * 16);
    std::fill_n(state + u * a.T, a.T, LseState());
    const int64_t end = std::min(groups, (u + 1) * unit);
    for (int64_t g = u * unit; g < end; g += piece) {
      const int64_t g1 = std::min(end, g + piece), ld = (g1 - g) * 16;
      for (int64_t r = 0; r < a.T; r += kRowBlock) {
        PackedRows p;
        p.m = std::min(kRowBlock, a.T - r), p.k = a.d, p.data = packed + r * row_dwords;
        packed_product(w, p, g, g1, logits.data(), ld, false);
        for (int64_t i = 0; i < p.m; ++i)
          lse_fold(logits.data() + i * ld, std::min(a.V, g1 * 16) - g * 16, g * 16,
                   lse_label(a.labels, r + i), state[u * a.T + r + i]);
      }
    }
  };
  const auto finish = [&](int64_t i) {
    LseState s;
    for (int64_t u = 0; u < units; ++u) lse_merge(state[u * a.T + i], s);
    s.finish(i, a.labels, a.nll, a.lse, a.argmax);
  };
  if (threads == 1) {
    pack_rows(w.type, x, packed, 0, a.T);
    for (int64_t u = 0; u < units; ++u) fold(u);
    for (int64_t i = 0; i < a.T; ++i) finish(i);
    return;
  }
  const int64_t chunk = packed_rows_chunk(), chunks = (a.T + chunk - 1) / chunk;
  Shares shares(units, threads);
#pragma omp parallel num_threads(threads)
  {
#pragma omp for schedule(static)
    for (int64_t i = 0; i < chunks; ++i)
      pack_rows(w.type, x, packed, i * chunk, std::min(a.T, (i + 1) * chunk));
    shares.run(omp_get_thread_num(), fold);
#pragma omp barrier
#pragma omp for schedule(static) nowait
    for (int64_t i = 0; i < a.T; ++i) finish(i);
  }
}

}  // namespace v3b::kern
