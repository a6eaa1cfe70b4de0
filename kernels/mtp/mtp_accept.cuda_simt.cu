// Speculative acceptance (SPEC 1.28). Two kernels: segments of 4096 entries leave the key of their largest entry (greedy)
// or their two sums, of the residual and of p (sampling); then one block a sequence finds the segment in which the
// cumulative sum passes u * total and walks that segment alone.
#include "kernels/core/cuda_vector.cuh"
#include "kernels/core/order_key.h"
#include "kernels/mtp/mtp_cuda.h"

namespace v3b::kern {
namespace {

using namespace dev;

constexpr int kThreads = 256;
constexpr int kEach = 16;  // neighbouring entries of a thread
constexpr int64_t kSegment = kThreads * kEach;

struct Sums {
  double residual, p;
};
// What is sampled from: the residual of the first rejected draft, or the last row of p.
struct Source {
  const float* p;
  const float* q;
  int64_t one_hot, count;  // count: drafts accepted
  bool residual;
};
__device__ __forceinline__ Source source_of(const spec::MtpAcceptArgs& a, int64_t b) {
  const int64_t k = accepted_drafts(a, b);
  Source s = {a.p + (b * (a.gamma + 1) + k) * a.V, nullptr, -1, k, k < a.gamma};
  if (s.residual) {
    s.one_hot = a.draft[b * a.gamma + k];
    if (a.q != nullptr) s.q = a.q + (b * a.gamma + k) * a.V;
  }
  return s;
}
// p and residual of the thread's entries from `at` on; 0 at and past V.
__device__ __forceinline__ void weights_of(const Source& s, int64_t at, int64_t V, bool wide,
                                           float (&p)[kEach], float (&q)[kEach]) {
#pragma unroll
  for (int h = 0; h < kEach; h += 8) {
    float v[8];
    load8(s.p + at + h, wide, V - at - h, v);
#pragma unroll
    for (int i = 0; i < 8; ++i) p[h + i] = v[i];
    if (s.q != nullptr) load8(s.q + at + h, wide, V - at - h, v);
#pragma unroll
    for (int i = 0; i < 8; ++i)
      q[h + i] = s.q != nullptr ? v[i] : at + h + i == s.one_hot ? 1.0f : 0.0f;
  }
}

// Sequence blockIdx.x, segment blockIdx.y.
__global__ void __launch_bounds__(kThreads)
    sums_kernel(spec::MtpAcceptArgs a, bool wide, Sums* sums) {
  V3B_DYNAMIC_SHARED(shared);
  double* scratch = reinterpret_cast<double*>(shared);
  const Source s = source_of(a, blockIdx.x);
  float p[kEach], q[kEach];
  weights_of(s, blockIdx.y * kSegment + kEach * static_cast<int64_t>(threadIdx.x), a.V, wide, p, q);
  Sums mine = {0, 0};
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
    mine.p += static_cast<double>(p[i]);
    if (s.residual) mine.residual += residual_weight(p[i], q, i, -1);
  }
  mine.p = block_sum(mine.p, scratch);
  mine.residual = block_sum(mine.residual, scratch);
  if (threadIdx.x == 0) sums[static_cast<int64_t>(blockIdx.x) * gridDim.y + blockIdx.y] = mine;
}

__global__ void __launch_bounds__(kThreads)
    sampled_kernel(spec::MtpAcceptArgs a, bool wide, const Sums* sums, int segments) {
  V3B_DYNAMIC_SHARED(shared);
  double* prefix =
      reinterpret_cast<double*>(shared);  // [8] of warps, then the mark and what lies before
  int* found = reinterpret_cast<int*>(shared + 16 * 8);  // [3 * 8] of warps, then use_p, segment
  constexpr int kWarps = kThreads / 32;
  const int64_t b = blockIdx.x;
  const Source s = source_of(a, b);
  const Sums* mine = sums + b * segments;
  if (threadIdx.x == 0) {
    double p = 0, residual = 0;
    for (int i = 0; i < segments; ++i) p += mine[i].p, residual += mine[i].residual;
    const bool use_p = !(s.residual && residual > 0);
    const double mark = a.uniform[b * (a.gamma + 1) + a.gamma] * (use_p ? p : residual);
    double sum = 0, before = 0, before_last = 0;
    int segment = -1, last = 0;
    for (int i = 0; i < segments && segment < 0; ++i) {
      const double w = use_p ? mine[i].p : mine[i].residual;
      before = sum;
      sum += w;
      if (w > 0) last = i, before_last = before;
      if (w > 0 && sum > mark) segment = i;
    }
    if (segment < 0) segment = last, before = before_last;  // u * total was rounded up to the total
    prefix[kWarps] = mark;
    prefix[kWarps + 1] = before;
    found[3 * kWarps] = use_p;
    found[3 * kWarps + 1] = segment;
  }
  __syncthreads();
  const double mark = prefix[kWarps], before = prefix[kWarps + 1];
  const bool use_p = found[3 * kWarps] != 0;
  const int64_t at = found[3 * kWarps + 1] * kSegment + kEach * static_cast<int64_t>(threadIdx.x);
  float p[kEach], q[kEach];
  weights_of(s, at, a.V, wide, p, q);
  double local = 0;
#pragma unroll
  for (int i = 0; i < kEach; ++i)
    local += use_p ? static_cast<double>(p[i]) : residual_weight(p[i], q, i, -1);
  double inclusive = local;
#pragma unroll
  for (int o = 1; o < 32; o *= 2) {
    const double below = __shfl_up_sync(kFullMask, inclusive, o);
    if (lane_id() >= o) inclusive += below;
  }
  if (lane_id() == 31) prefix[warp_id()] = inclusive;
  __syncthreads();
  double base = before;
  for (int w = 0; w < warp_id(); ++w) base += prefix[w];
  const double start = base + (inclusive - local);
  const unsigned crosses = __ballot_sync(kFullMask, local > 0 && base + inclusive > mark);
  const unsigned some = __ballot_sync(kFullMask, local > 0);
  if (lane_id() == 0) {
    found[warp_id()] = crosses != 0 ? 32 * warp_id() + __ffs(static_cast<int>(crosses)) - 1 : -1;
    found[kWarps + warp_id()] =
        some != 0 ? 32 * warp_id() + 31 - __clz(static_cast<int>(some)) : -1;
  }
  __syncthreads();
  int winner = -1;
  for (int w = kWarps - 1; w >= 0; --w)
    if (found[w] >= 0) winner = found[w];  // the first thread that crosses
  for (int w = kWarps - 1; w >= 0 && winner < 0; --w) winner = found[kWarps + w];  // the last one
  if (winner < 0) winner = 0;
  if (static_cast<int>(threadIdx.x) != winner) return;
  double sum = start;
  int64_t token = -1;
  bool passed = false;
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
    const double w = use_p ? static_cast<double>(p[i]) : residual_weight(p[i], q, i, -1);
    if (!(w > 0) || passed) continue;
    sum += w;
    token = at + i;
    passed = sum > mark;
  }
  if (token < 0) token = 0;  // nothing is positive: as the reference
  a.accepted[b] = static_cast<int32_t>(s.count);
  for (int64_t j = 0; j <= a.gamma; ++j)
    a.tokens[b * (a.gamma + 1) + j] = j < s.count    ? a.draft[b * a.gamma + j]
                                      : j == s.count ? static_cast<int32_t>(token)
                                                     : -1;
}

// Row blockIdx.x of [B * (gamma + 1)], segment blockIdx.y.
__global__ void __launch_bounds__(kThreads)
    largest_kernel(spec::MtpAcceptArgs a, bool wide, uint64_t* best) {
  V3B_DYNAMIC_SHARED(shared);
  const float* row = a.p + static_cast<int64_t>(blockIdx.x) * a.V;
  uint64_t mine = 0;
#pragma unroll
  for (int c = 0; c < kEach / 8; ++c) {
    const int64_t j =
        blockIdx.y * kSegment + 8 * (static_cast<int64_t>(threadIdx.x) + c * kThreads);
    float v[8];
    load8(row + j, wide, a.V - j, v);
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const uint64_t key = j + i < a.V ? pick_key(order_key(v[i]), j + i) : 0;
      mine = key > mine ? key : mine;
    }
  }
  mine = block_max(mine, reinterpret_cast<uint64_t*>(shared));
  if (threadIdx.x == 0) best[static_cast<int64_t>(blockIdx.x) * gridDim.y + blockIdx.y] = mine;
}
// One warp a sequence.
__global__ void __launch_bounds__(32)
    greedy_kernel(spec::MtpAcceptArgs a, const uint64_t* best, int segments) {
  const int64_t b = blockIdx.x;
  int64_t k = 0;
  int32_t next = 0;
  for (;; ++k) {
    uint64_t top = 0;
    for (int i = lane_id(); i < segments; i += 32) {
      const uint64_t v = best[(b * (a.gamma + 1) + k) * segments + i];
      top = v > top ? v : top;
    }
    next = pick_index(warp_max(top));
    if (k == a.gamma || a.draft[b * a.gamma + k] != next) break;
  }
  if (lane_id() == 0) a.accepted[b] = static_cast<int32_t>(k);
  for (int64_t j = lane_id(); j <= a.gamma; j += 32)
    a.tokens[b * (a.gamma + 1) + j] = j < k ? a.draft[b * a.gamma + j] : j == k ? next : -1;
}

int64_t segments_of(const spec::MtpAcceptArgs& a) { return (a.V + kSegment - 1) / kSegment; }

}  // namespace

int64_t mtp_accept_cuda_scratch_bytes(const spec::MtpAcceptArgs& a) {
  const int64_t each = a.greedy ? (a.gamma + 1) * 8 : static_cast<int64_t>(sizeof(Sums));
  return a.B * segments_of(a) * each;
}

void mtp_accept_cuda_simt(const spec::MtpAcceptArgs& a, void* scratch, CudaStream stream) {
  if (a.B == 0 || a.V == 0) return;
  const unsigned B = static_cast<unsigned>(a.B), S = static_cast<unsigned>(segments_of(a));
  const bool wide = a.V % 4 == 0 && aligned16(a.p, a.q);
  if (a.greedy) {
    auto* best = static_cast<uint64_t*>(scratch);
    launch(largest_kernel,
           {dim3(static_cast<unsigned>(a.B * (a.gamma + 1)), S), kThreads, 34 * 8, stream}, a, wide,
           best);
    launch(greedy_kernel, {dim3(B), 32, 0, stream}, a, static_cast<const uint64_t*>(best),
           static_cast<int>(S));
  } else {
    auto* sums = static_cast<Sums*>(scratch);
    launch(sums_kernel, {dim3(B, S), kThreads, 34 * 8, stream}, a, wide, sums);
    launch(sampled_kernel, {dim3(B), kThreads, 16 * 8 + 32 * 4, stream}, a, wide,
           static_cast<const Sums*>(sums), static_cast<int>(S));
  }
}

}  // namespace v3b::kern
