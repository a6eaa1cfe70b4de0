// Split-KV over sequences of unequal lengths that only the device knows: the tiles of keys of all sequences stand in one
// row, part p (of `parts`, fixed by the grid) takes chunk = ceil(total / parts) neighbours of it. A part may end one
// sequence and begin the next, so a partial result is named by slot = part + sequence, which is unique because both
// only grow along the row; slots < parts + B. A sequence that lies in one part needs no merge.
#pragma once
#include "kernels/core/cuda_device.cuh"

namespace v3b::kern::dev {

struct SplitSchedule {
  const int32_t* lengths;  // [B]
  int B, tile, parts;      // tile: keys
};
V3B_HD int split_tiles(int length, int tile) { return length > 0 ? (length + tile - 1) / tile : 0; }
V3B_HD int split_chunk(int total, int parts) { return total > 0 ? (total + parts - 1) / parts : 1; }

// Sum of tiles of the sequences below `end`; by a whole warp, every lane gets it.
__device__ __forceinline__ int split_before(const SplitSchedule& s, int end) {
  int sum = 0;
  for (int b = lane_id(); b < end; b += kWarp) sum += split_tiles(s.lengths[b], s.tile);
#pragma unroll
  for (int o = 16; o > 0; o >>= 1) sum += __shfl_xor_sync(kFullMask, sum, o);
  return sum;
}
// The sequence that holds tile `target` < total, and the tiles before that sequence; by a whole warp.
__device__ __forceinline__ int split_find(const SplitSchedule& s, int target, int& before) {
  before = 0;
  for (int base = 0; base < s.B; base += kWarp) {
    const int b = base + lane_id();
    const int mine = b < s.B ? split_tiles(s.lengths[b], s.tile) : 0;
    int upto = mine;
#pragma unroll
    for (int o = 1; o < kWarp; o <<= 1) {
      const int below = __shfl_up_sync(kFullMask, upto, o);
      if (lane_id() >= o) upto += below;
    }
    const unsigned beyond = __ballot_sync(kFullMask, before + upto > target);
    if (beyond != 0) {
      const int first = __ffs(static_cast<int>(beyond)) - 1;
      before += __shfl_sync(kFullMask, upto - mine, first);
      return base + first;
    }
    before += __shfl_sync(kFullMask, upto, kWarp - 1);
  }
  return s.B;
}

// The segments of one part: body(b, length, first key, last key, slot or -1 if the segment is the whole sequence).
// Every thread of the block runs it alike.
template <class Body>
__device__ __forceinline__ void split_walk(const SplitSchedule& s, int part, Body&& body) {
  const int total = split_before(s, s.B), chunk = split_chunk(total, s.parts);
  int at = part * chunk;
  const int end = min(total, at + chunk);
  if (at >= end) return;
  int before = 0;
  for (int b = split_find(s, at, before); at < end; ++b) {
    const int length = s.lengths[b], tiles = split_tiles(length, s.tile);
    if (tiles == 0) continue;
    const int first = at - before, last = min(tiles, end - before);
    body(b, length, first * s.tile, min(length, last * s.tile),
         first == 0 && last == tiles ? -1 : part + b);
    before += tiles;
    at = before;
  }
}

}  // namespace v3b::kern::dev
