// Merge of split-KV partials: lse = log sum exp lse_p, o = sum exp(lse_p - lse) o_p. One block a row of a sequence; rows
// that one part finished alone are left as they are. Bound by bytes: the partials once, about 1/16 of the keys' at 16
// heads and 64 keys a part; nothing for long sequences in large batches.
#include "kernels/attention/split_merge.h"
#include "kernels/attention/split_schedule.cuh"
#include "kernels/core/cuda_device.cuh"

namespace v3b::kern {
namespace {

using namespace dev;

constexpr int kThreads = 128;
constexpr float kLn2 = 0.693147180559945309f;

template <class T>
__global__ void __launch_bounds__(kThreads) split_merge_kernel(SplitMergeArgs a) {
  const int b = static_cast<int>(blockIdx.y), row = static_cast<int>(blockIdx.x);
  const SplitSchedule s{a.lengths, static_cast<int>(a.B), a.tile, a.parts};
  const int rows = static_cast<int>(a.s_q * a.n_h);
  const int tiles = split_tiles(a.lengths[b], a.tile);
  int first = 0, last = -1;  // parts
  if (tiles > 0) {
    const int chunk = split_chunk(split_before(s, s.B), s.parts), before = split_before(s, b);
    first = before / chunk, last = (before + tiles - 1) / chunk;
    if (first == last) return;  // its block wrote the result
  }
  float top = -INFINITY, sum = 0;
  for (int p = first; p <= last; ++p)
    top = fmaxf(top, a.lse2[static_cast<int64_t>(p + b) * rows + row]);
  const bool empty = top == -INFINITY;
  if (!empty)
    for (int p = first; p <= last; ++p)
      sum += fast_exp2(a.lse2[static_cast<int64_t>(p + b) * rows + row] - top);
  T* out = static_cast<T*>(a.out) + (static_cast<int64_t>(b) * rows + row) * a.d;
  for (int64_t c = threadIdx.x; c < a.d; c += kThreads) {
    float v = 0;
    if (!empty)
      for (int p = first; p <= last; ++p) {
        const int64_t at = static_cast<int64_t>(p + b) * rows + row;
        const float w = fast_exp2(a.lse2[at] - top);
        if (w > 0) v += w * a.partial[at * a.d + c];
      }
    out[c] = from_float<T>(empty ? 0.0f : v / sum);
  }
  if (a.lse != nullptr && threadIdx.x == 0) {
    const int64_t i = row / a.n_h, h = row % a.n_h;
    const float none = a.empty_lse == spec::EmptyLse::pos_inf ? INFINITY : -INFINITY;
    a.lse[(b * a.n_h + h) * a.s_q + i] = empty ? none : (top + log2f(sum)) * kLn2;
  }
}

}  // namespace

void split_merge(const SplitMergeArgs& a, CudaStream stream) {
  const LaunchConfig c{dim3(static_cast<unsigned>(a.s_q * a.n_h), static_cast<unsigned>(a.B)),
                       kThreads, 0, stream};
  if (a.dtype == spec::DType::bf16)
    launch(split_merge_kernel<spec::bf16>, c, a);
  else
    launch(split_merge_kernel<float>, c, a);
}

}  // namespace v3b::kern
