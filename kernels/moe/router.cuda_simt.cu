// Router (SPEC 1.11, 1.12): one warp a token, scores in registers (element e in lane e % 32), biased scores in shared
// memory for the group sums. Cost a token at E = 256: 8 exponentials a lane, two best of every group by a few lanes each,
// then K rounds of a warp-wide maximum over 64-bit keys (value, then lower index). Latency is the roof: T = 512 is 128
// blocks, 1 KiB of logits a token.
#include "kernels/core/cuda_vector.cuh"
#include "kernels/core/order_key.h"
#include "kernels/moe/moe_cuda.h"
#include "model/error.h"

namespace v3b::kern {
namespace {

using namespace dev;

constexpr int kWarps = 4, kThreads = 32 * kWarps;

// Rows of shared memory are padded, so that lanes at a stride of a group hit different banks.
__device__ __forceinline__ int padded(int e) { return e + (e >> 5); }

struct Shared {  // of one warp
  float *score, *biased, *group;
  int stride;
};

// Groups that stay: kept[g] = 1 or 0 in s.group. `lanes` lanes sum one group, so 32 / lanes groups a round.
__device__ __forceinline__ void choose_groups(const spec::RouterConfig& c, const Shared& s,
                                              int lanes) {
  const int G = static_cast<int>(c.G), size = static_cast<int>(c.E / c.G);
  const int sub = lane_id() % lanes, own = lane_id() / lanes, each_round = 32 / lanes;
  float* score = s.group;
  float* kept = s.group + G;
  for (int g0 = 0; g0 < G; g0 += each_round) {
    const int g = g0 + own;
    float first = -INFINITY, second = -INFINITY;
    bool nan = false;
    if (g < G)
      for (int i = sub; i < size; i += lanes) {
        const float v = s.biased[padded(g * size + i)];
        nan = nan || v != v;
        second = fmaxf(second, fminf(first, v));
        first = fmaxf(first, v);
      }
    for (int o = lanes / 2; o > 0; o /= 2) {
      const float f = __shfl_xor_sync(kFullMask, first, o);
      const float t = __shfl_xor_sync(kFullMask, second, o);
      nan = __shfl_xor_sync(kFullMask, nan ? 1 : 0, o) != 0 || nan;
      second = fmaxf(fmaxf(second, t), fminf(first, f));
      first = fmaxf(first, f);
    }
    if (g < G && sub == 0)
      score[g] = nan ? NAN : c.group_rule == spec::GroupRule::top2_sum ? first + second : first;
  }
  __syncwarp();
  for (int g = lane_id(); g < G; g += 32) {
    const uint64_t mine = pick_key(order_key(score[g]), g);
    int better = 0;
    for (int o = 0; o < G; ++o) better += pick_key(order_key(score[o]), o) > mine;
    kept[g] = better < c.M ? 1.0f : 0.0f;
  }
  __syncwarp();
}

template <int kEach>  // scores a lane
__global__ void __launch_bounds__(kThreads)
    router_kernel(spec::RouterSelectArgs a, int group_lanes, int stride, int group_floats) {
  V3B_DYNAMIC_SHARED(shared);
  const spec::RouterConfig& c = a.config;
  const int64_t t = static_cast<int64_t>(blockIdx.x) * kWarps + warp_id();
  if (t >= a.T) return;  // whole warps; only warp barriers below
  const int E = static_cast<int>(c.E), K = static_cast<int>(c.K);
  float* base = reinterpret_cast<float*>(shared) + warp_id() * (2 * stride + group_floats);
  const Shared s = {base, base + stride, base + 2 * stride, stride};

  float v[kEach];
  const float* z = a.logits + t * E;
#pragma unroll
  for (int j = 0; j < kEach; ++j) {
    const int e = lane_id() + 32 * j;
    v[j] = e < E ? z[e] : -INFINITY;
  }
  if (c.scoring == spec::Scoring::sigmoid) {
#pragma unroll
    for (int j = 0; j < kEach; ++j)  // exp is capped: a very negative logit gives a tiny score
      v[j] = v[j] != v[j] ? v[j] : 1.0f / (1.0f + expf(fminf(-v[j], 88.0f)));
  } else {
    float m = -INFINITY, sum = 0;
#pragma unroll
    for (int j = 0; j < kEach; ++j) m = fmaxf(m, v[j]);
    m = warp_max(m);
#pragma unroll
    for (int j = 0; j < kEach; ++j) {
      v[j] = lane_id() + 32 * j < E ? expf(v[j] - m) : 0.0f;
      sum += v[j];
    }
    sum = warp_sum(sum);
#pragma unroll
    for (int j = 0; j < kEach; ++j) v[j] = v[j] / sum;
  }
#pragma unroll
  for (int j = 0; j < kEach; ++j) {
    const int e = lane_id() + 32 * j;
    if (e >= E) continue;
    if (a.scores != nullptr) a.scores[t * E + e] = v[j];
    s.score[padded(e)] = v[j];
    if (a.bias != nullptr) v[j] += a.bias[e];
    s.biased[padded(e)] = v[j];
  }
  __syncwarp();

  const bool grouped = c.group_rule != spec::GroupRule::none && c.G > 1;
  const int size = grouped ? static_cast<int>(c.E / c.G) : E;
  if (grouped) choose_groups(c, s, group_lanes);
  uint64_t key[kEach];
#pragma unroll
  for (int j = 0; j < kEach; ++j) {
    const int e = lane_id() + 32 * j;
    key[j] = 0;
    if (e >= E) continue;
    const bool stays = !grouped || s.group[c.G + e / size] != 0.0f;
    const uint32_t order = stays                                     ? order_key(v[j])
                           : c.router_mask == spec::RouterMask::zero ? order_key(0.0f)
                                                                     : 0u;
    key[j] = pick_key(order, e);
  }
  int chosen = 0;  // lane k: the k-th
  for (int k = 0; k < K; ++k) {
    uint64_t best = 0;
#pragma unroll
    for (int j = 0; j < kEach; ++j) best = key[j] > best ? key[j] : best;
    best = warp_max(best);
    const int e = pick_index(best);
    if (lane_id() == k) chosen = e;
#pragma unroll
    for (int j = 0; j < kEach; ++j)
      if (lane_id() + 32 * j == e) key[j] = 0;
  }
  const float score = lane_id() < K ? s.score[padded(chosen)] : 0.0f;
  float sum = c.gate_eps == spec::GateEps::eps_1e20 ? 1e-20f : 0.0f;
  for (int k = 0; k < K; ++k) sum += __shfl_sync(kFullMask, score, k);
  if (lane_id() >= K) return;
  const bool normalise = c.norm_topk_prob && K > 1;
  const float scale = c.scale_only_if_unnormalised && normalise ? 1.0f : static_cast<float>(c.c_r);
  a.idx[t * K + lane_id()] = chosen;
  a.weight[t * K + lane_id()] = (normalise ? score / sum : score) * scale;
}

}  // namespace

void router_cuda_simt(const spec::RouterSelectArgs& a, CudaStream stream) {
  const spec::RouterConfig& c = a.config;
  if (c.E < 1 || c.E > kRouterMaxExperts || c.K < 1 || c.K > kRouterMaxK || c.K > c.E)
    throw Error(ExitCode::usage, "router size out of range", "router.cuda_simt",
                "E <= 1024, K <= 32, K <= E");
  if (a.T == 0) return;
  const bool grouped = c.group_rule != spec::GroupRule::none && c.G > 1;
  int lanes = 32;  // of a group, all groups in one round where they fit
  while (grouped && lanes > 1 && 32 / lanes < c.G) lanes /= 2;
  const int stride = static_cast<int>(c.E + c.E / 32 + 1);
  const int group_floats = grouped ? static_cast<int>(2 * c.G) : 0;
  const LaunchConfig config = {dim3(static_cast<unsigned>((a.T + kWarps - 1) / kWarps)), kThreads,
                               int64_t{kWarps} * (2 * stride + group_floats) * 4, stream};
  if (c.E <= 256)
    launch(router_kernel<8>, config, a, lanes, stride, group_floats);
  else if (c.E <= 512)
    launch(router_kernel<16>, config, a, lanes, stride, group_floats);
  else
    launch(router_kernel<32>, config, a, lanes, stride, group_floats);
}

}  // namespace v3b::kern
