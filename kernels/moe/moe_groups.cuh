// Which expert and rows a block works on, found on the device.
#pragma once
#include "kernels/core/cuda_device.cuh"
#include "kernels/moe/moe_experts_cuda.h"

namespace v3b::kern {

struct GroupTile {
  int expert = -1;  // -1: nothing to do
  int64_t row = 0;  // first row of the tile
  int rows = 0;     // at most kM
};

// The tile-th tile of kM rows; every lane of every warp calls and gets the same answer.
template <int kM>
__device__ __forceinline__ GroupTile find_tile(const MoeGroups& g, int64_t tile) {
  GroupTile r;
  if (g.offsets == nullptr) {
    const auto per = static_cast<uint32_t>((g.capacity + kM - 1) / kM);
    const int64_t e = static_cast<uint32_t>(tile) / per,
                  first = int64_t{static_cast<uint32_t>(tile) % per} * kM;
    const int64_t count = g.counts == nullptr ? g.capacity : g.counts[e];
    if (first >= count) return r;
    r.expert = static_cast<int>(e);
    r.row = e * g.capacity + first;
    r.rows = static_cast<int>(min(static_cast<int64_t>(kM), count - first));
    return r;
  }
  int64_t before = 0;  // tiles of experts below
  for (int64_t e0 = 0; e0 < g.E; e0 += 32) {
    const int64_t e = e0 + dev::lane_id();
    const int64_t first = e < g.E ? g.offsets[e] : 0, last = e < g.E ? g.offsets[e + 1] : 0;
    const int64_t mine = (last - first + kM - 1) / kM;
    int64_t sum = mine;  // inclusive prefix
#pragma unroll
    for (int o = 1; o < 32; o *= 2) {
      const int64_t below = __shfl_up_sync(dev::kFullMask, sum, o);
      if (dev::lane_id() >= o) sum += below;
    }
    const bool here = before + sum > tile && before + sum - mine <= tile;
    const unsigned lanes = __ballot_sync(dev::kFullMask, here);
    if (lanes != 0) {
      const int from = __ffs(static_cast<int>(lanes)) - 1;
      const int64_t row = first + (tile - (before + sum - mine)) * kM;
      const int64_t row0 = __shfl_sync(dev::kFullMask, row, from);
      const int64_t end = __shfl_sync(dev::kFullMask, last, from);
      r.expert = static_cast<int>(e0) + from;
      r.row = row0;
      r.rows = static_cast<int>(min(static_cast<int64_t>(kM), end - row0));
      return r;
    }
    before += __shfl_sync(dev::kFullMask, sum, 31);
  }
  return r;
}

// Tiles that may be needed, whatever the routes.
inline int64_t tile_bound(const MoeGroups& g, int64_t kM) {
  if (g.offsets == nullptr) return g.E * ((g.capacity + kM - 1) / kM);
  return g.max_rows / kM + (g.E < g.max_rows ? g.E : g.max_rows);
}
// Most rows that one expert may have.
inline int64_t rows_bound(const MoeGroups& g) {
  if (g.offsets == nullptr) return g.capacity;
  return g.max_of_one > 0 ? g.max_of_one : g.max_rows;
}

__device__ __forceinline__ float silu_times(float gate, float up) {
  return gate / (1.0f + expf(-gate)) * up;
}

}  // namespace v3b::kern
