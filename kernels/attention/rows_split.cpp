// Threads for rows.h: independent tasks, the long ones cut along their keys.
#include <omp.h>

#include <algorithm>
#include <atomic>
#include <vector>

#include "kernels/attention/rows.h"
#include "kernels/core/buffer.h"
#include "kernels/core/team.h"

namespace v3b::kern {
namespace {
constexpr int64_t kLongWork =
    16;  // key blocks a thread from which finer cuts (for balance) cost nothing

// Packing, softmax and short tiles: a task runs at about a third of the rate of a matrix product.
constexpr double kSoftmaxFactor = 3;

constexpr int64_t kMergeAlone = 512 << 10;  // floats of partial results

struct Piece {
  int64_t task, j0, j1, part;  // part: its number among the task's pieces
};
int64_t blocks(const RowsTask& t) { return (t.j1 - t.j0 + kKeyBlock - 1) / kKeyBlock; }
}  // namespace

RowsWork rows_work(const RowsTask& t) noexcept {
  const double keys = static_cast<double>(std::max<int64_t>(0, t.j1 - t.j0));
  const double row = static_cast<double>(t.keys.v == nullptr ? t.d_qk : t.d_qk + t.d_v);
  return {
      keys * row * static_cast<double>(spec::dtype_bytes(t.dtype)),
      kSoftmaxFactor * 2 * static_cast<double>(t.R) * keys * static_cast<double>(t.d_qk + t.d_v)};
}

void rows_run_split(const RowsTask* tasks, int64_t n) noexcept {
  int64_t all = 0;
  double bytes = 0, flop = 0;
  for (int64_t i = 0; i < n; ++i) {
    all += blocks(tasks[i]);
    const RowsWork w = rows_work(tasks[i]);
    bytes += w.bytes, flop += w.flop;
  }
  const int64_t threads = team_for(bytes, flop);
  const int64_t pieces_a_thread = all / threads >= kLongWork ? 2 : 1;
  const int64_t limit =
      std::max<int64_t>(2, (all + threads * pieces_a_thread - 1) / (threads * pieces_a_thread));

  std::vector<Piece> pieces;
  std::vector<int64_t> parts(n, 1),
      part_at(n, 0);  // pieces of a task; first float of its partial results
  int64_t floats = 0;
  for (int64_t i = 0; i < n; ++i) {
    const RowsTask& t = tasks[i];
    parts[i] = threads == 1 ? 1 : std::max<int64_t>(1, (blocks(t) + limit - 1) / limit);
    const int64_t step = (blocks(t) + parts[i] - 1) / parts[i] * kKeyBlock;
    for (int64_t p = 0; p < parts[i]; ++p)
      pieces.push_back({i, t.j0 + p * step, std::min(t.j1, t.j0 + (p + 1) * step), p});
    part_at[i] = floats;
    if (parts[i] > 1) floats += parts[i] * t.R * (t.d_v + 2);
  }
  static thread_local Buffer<float> partial_buffer;
  partial_buffer.reserve_discard(floats);
  float* const partial = partial_buffer.data();
  const auto with_parts = [&](int64_t i,
                              int64_t part) {  // R rows of o for each part, then all m, then all l
    RowsTask t = tasks[i];
    float* base = partial + part_at[i];
    t.part_o = base + part * t.R * t.d_v;
    t.part_m = base + parts[i] * t.R * t.d_v + part * t.R;
    t.part_l = base + parts[i] * t.R * (t.d_v + 1) + part * t.R;
    return t;
  };

  // Few partial results are merged by the thread that finishes the last of a task: no second barrier (a sleeping team
  // takes some 40 us for one). Many are shared by all threads.
  const bool merge_last = floats <= kMergeAlone;
  std::vector<std::atomic<int64_t>> missing(merge_last ? static_cast<size_t>(n) : 0);
  for (size_t i = 0; i < missing.size(); ++i) missing[i] = parts[i];

#pragma omp parallel num_threads(threads)
  {
#pragma omp for schedule(dynamic) nowait
    for (size_t k = 0; k < pieces.size(); ++k) {
      const Piece& p = pieces[k];
      RowsTask t = parts[p.task] > 1 ? with_parts(p.task, p.part) : tasks[p.task];
      t.j0 = p.j0;
      t.j1 = p.j1;
      rows_run(t);
      if (merge_last && parts[p.task] > 1 && missing[static_cast<size_t>(p.task)].fetch_sub(1) == 1)
        rows_merge(with_parts(p.task, 0), parts[p.task], 0, t.R);
    }
    if (!merge_last) {
#pragma omp barrier  // all parts are there
#pragma omp for schedule(dynamic)
      for (int64_t i = 0; i < n * threads; ++i) {  // rows of a task in as many shares as threads
        const int64_t task = i / threads, share = i % threads, R = tasks[task].R;
        if (parts[task] > 1)
          rows_merge(with_parts(task, 0), parts[task], R * share / threads,
                     R * (share + 1) / threads);
      }
    }
  }
}

}  // namespace v3b::kern
