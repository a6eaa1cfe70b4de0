// Sampling distribution (SPEC 1.28): one block a row. The weights go to p once, then every thread reads back only what it
// wrote: maximum, weights, four rounds of counting (histograms of integer masses in shared memory, so no sum depends on
// an order), the cut. 4 V bytes of logits and 28 V of p, all but the first from L2: about 30 us a row of 129280; rows
// run side by side. Few rows a step make this latency, not bandwidth.
#include "kernels/core/cuda_vector.cuh"
#include "kernels/mtp/mtp_cuda.h"
#include "model/error.h"

namespace v3b::kern {
namespace {

using namespace dev;

constexpr int kThreads = 1024;
using Mass = unsigned long long;

struct Scratch {
  float floats[34];
  int ints[34];
  TopPSearch search;
  Mass total, target;
  Mass mass[256];
};

// Adds into mass[digit] once a run of equal digits of neighbouring lanes would be faster still; shared-memory atomics on
// integers are deterministic.
__device__ __forceinline__ void clear(Scratch& s) {
  for (int i = static_cast<int>(threadIdx.x); i < 256; i += kThreads) s.mass[i] = 0;
  __syncthreads();
}

// Warp 0: the bucket where the sum from the top reaches the target. Lane l owns buckets 255-8l .. 248-8l.
__device__ __forceinline__ void step(Scratch& s, int round) {
  const int from = 255 - 8 * lane_id();
  Mass own = 0;
  for (int i = 0; i < 8; ++i) own += s.mass[from - i];
  Mass inclusive = own;
#pragma unroll
  for (int o = 1; o < 32; o *= 2) {
    const Mass below = __shfl_up_sync(kFullMask, inclusive, o);
    if (lane_id() >= o) inclusive += below;
  }
  const unsigned reached = __ballot_sync(kFullMask, s.search.above + inclusive >= s.target);
  const int lane = reached != 0 ? __ffs(static_cast<int>(reached)) - 1 : 31;
  __syncwarp();
  if (lane_id() == lane)
    top_p_step(s.search, round, s.mass, from, from - 7, inclusive - own, s.target);
}

__global__ void __launch_bounds__(kThreads) sampling_kernel(SamplingArgs a, float inverse) {
  V3B_DYNAMIC_SHARED(shared);
  Scratch& s = *reinterpret_cast<Scratch*>(shared);
  const float* z = a.logits + static_cast<int64_t>(blockIdx.x) * a.stride;
  float* p = a.p + static_cast<int64_t>(blockIdx.x) * a.V;
  const int64_t first = threadIdx.x;
  float m = -INFINITY;
  for (int64_t i = first; i < a.V; i += kThreads) m = fmaxf(m, z[i]);
  m = block_max(m, s.floats);
  if (threadIdx.x == 0) s.total = 0, s.search = TopPSearch{};
  clear(s);
  Mass mine = 0;
  for (int64_t i = first; i < a.V; i += kThreads) {
    const float e = z[i] == m ? 1.0f : expf((z[i] - m) * inverse);
    const float w = e > 0 ? e : 0.0f;  // NaN is never drawn
    p[i] = w;
    mine += sampling_mass(w);
  }
  for (int o = 16; o > 0; o >>= 1) mine += __shfl_xor_sync(kFullMask, mine, o);
  if (lane_id() == 0) atomicAdd(&s.total, mine);
  __syncthreads();
  if (a.top_p >= 1) {
    const float scale = static_cast<float>(kSamplingUnit / static_cast<double>(s.total));
    for (int64_t i = first; i < a.V; i += kThreads) p[i] *= scale;
    return;
  }
  if (threadIdx.x == 0) s.target = sampling_target(a.top_p, s.total);
  for (int round = 0; round < kTopPRounds; ++round) {
    __syncthreads();
    const TopPSearch search = s.search;
    for (int64_t i = first; i < a.V; i += kThreads) {
      const uint32_t bits = __float_as_uint(p[i]);
      const Mass add = sampling_mass(p[i]);
      if (add != 0 && top_p_candidate(search, round, bits))
        atomicAdd(&s.mass[top_p_digit(round, bits)], add);
    }
    __syncthreads();
    if (warp_id() == 0) step(s, round);
    __syncthreads();
    if (round + 1 < kTopPRounds) clear(s);
  }
  const TopPCut cut = top_p_cut(s.search, s.target);
  const float scale = static_cast<float>(cut.scale);
  const Mass each = sampling_mass(__uint_as_float(cut.threshold));
  const int64_t equal =
      each == 0 ? 0
                : static_cast<int64_t>(s.mass[top_p_digit(kTopPRounds - 1, cut.threshold)] / each);
  if (equal <= cut.ties) {  // nearly always: one weight equals the threshold
    for (int64_t i = first; i < a.V; i += kThreads)
      p[i] = __float_as_uint(p[i]) >= cut.threshold ? p[i] * scale : 0.0f;
    return;
  }
  int64_t seen = 0;  // equal ones in earlier rounds; the lowest ids stay
  for (int64_t i0 = 0; i0 < a.V; i0 += kThreads) {
    const int64_t i = i0 + first;
    const uint32_t bits = i < a.V ? __float_as_uint(p[i]) : 0;
    const bool tie = i < a.V && bits == cut.threshold;
    const unsigned ties = __ballot_sync(kFullMask, tie);
    __syncthreads();
    if (lane_id() == 0) s.ints[warp_id()] = __popc(ties);
    __syncthreads();
    int64_t rank = seen + __popc(ties & ((1u << lane_id()) - 1));
    for (int w = 0; w < kThreads / 32; ++w) {
      if (w < warp_id()) rank += s.ints[w];
      seen += s.ints[w];
    }
    if (i < a.V) p[i] = bits > cut.threshold || (tie && rank < cut.ties) ? p[i] * scale : 0.0f;
  }
}

}  // namespace

void sampling_distribution_cuda_simt(const SamplingArgs& a, CudaStream stream) {
  if (a.V < 1 || a.V > kSamplingMaxVocab || !(a.temperature > 0) || !(a.top_p > 0) ||
      !(a.top_p <= 1))
    throw Error(ExitCode::usage, "bad sampling parameters", "sampling_distribution",
                "1 <= V <= 2^20, temperature > 0, 0 < top-p <= 1");
  if (a.rows == 0) return;
  launch(sampling_kernel,
         {dim3(static_cast<unsigned>(a.rows)), kThreads, static_cast<int64_t>(sizeof(Scratch)),
          stream},
         a, static_cast<float>(1.0 / a.temperature));
}

}  // namespace v3b::kern
