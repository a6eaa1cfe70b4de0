// Rows to expert order (SPEC 1.14). A counting sort of the T K slots, stable and without atomics: a block owns a tile of
// slots, a thread owns an expert and walks the tile in order (shared-memory broadcasts, 4 slots a read).
//   few slots (up to kSmall): one block does counts, offsets and places
//   else: counts of every tile; one block sums over tiles and experts; places of every tile
// With a capacity (SPEC 1.15) a first kernel writes -1 for the dropped slots: every slot counts the slots of its expert
// that go before it, tile by tile, slots^2 compares (T = 512, K = 8: 17 M, a few us).
// Then the gather: every token's row is read once and written K times, T d e (K + 1) bytes: copy bandwidth is its roof
// (T = 512, d = 7168, K = 8 bf16: 66 MB, 20 us at 3.35 TB/s); the sort is a few us of latency.
#include "kernels/core/cuda_vector.cuh"
#include "kernels/core/order_key.h"
#include "kernels/moe/moe_cuda.h"

namespace v3b::kern {
namespace {

using namespace dev;

constexpr int kTile = 256;    // slots of a block
constexpr int kSmall = 1024;  // slots of the one-block form
constexpr int kPlanThreads = 256;
constexpr int kScanThreads = 1024;

// Calls f(position, expert) for every slot of the tile in order; padding is -1.
template <class F>
__device__ __forceinline__ void walk_tile(const int* tile, int count, F&& f) {
  for (int i = 0; i < count; i += 4) {
#pragma unroll
    for (int k = 0; k < 4; ++k) f(i + k, tile[i + k]);
  }
}
__device__ __forceinline__ int load_tile(const spec::MoeDispatchArgs& a, int64_t first, int limit,
                                         int* tile) {  // slots, rounded up to 4
  const int64_t slots = a.T * a.K;
  const int n = static_cast<int>(min(slots - first, static_cast<int64_t>(limit)));
  const int rounded = (n + 3) / 4 * 4;
  for (int i = static_cast<int>(threadIdx.x); i < rounded; i += static_cast<int>(blockDim.x))
    tile[i] = i < n ? a.idx[first + i] : -1;
  __syncthreads();
  return rounded;
}
// Exclusive prefix of v over the block's threads; *total: the sum. scratch: 34 ints.
__device__ __forceinline__ int block_exclusive(int v, int* scratch, int* total) {
  int inclusive = v;
#pragma unroll
  for (int o = 1; o < 32; o *= 2) {
    const int below = __shfl_up_sync(kFullMask, inclusive, o);
    if (lane_id() >= o) inclusive += below;
  }
  __syncthreads();
  if (lane_id() == 31) scratch[warp_id()] = inclusive;
  __syncthreads();
  if (warp_id() == 0) {
    const int warps = static_cast<int>(blockDim.x) / 32;
    const int mine = lane_id() < warps ? scratch[lane_id()] : 0;
    int sum = mine;
#pragma unroll
    for (int o = 1; o < 32; o *= 2) {
      const int below = __shfl_up_sync(kFullMask, sum, o);
      if (lane_id() >= o) sum += below;
    }
    if (lane_id() == 31) scratch[32] = sum;
    __syncwarp();
    if (lane_id() < warps) scratch[lane_id()] = sum - mine;
  }
  __syncthreads();
  *total = scratch[32];
  return scratch[warp_id()] + inclusive - v;
}

// Offsets of all experts from their counts; E in rounds of the block's threads.
template <class Count, class Done>
__device__ __forceinline__ void offsets_of(const spec::MoeDispatchArgs& a, int* scratch,
                                           Count&& count, Done&& done) {
  int before = 0;
  for (int64_t e0 = 0; e0 < a.E; e0 += blockDim.x) {
    const int64_t e = e0 + threadIdx.x;
    const int n = e < a.E ? count(e) : 0;
    int total;
    const int at = before + block_exclusive(n, scratch, &total);
    if (e < a.E) {
      a.offsets[e] = at;
      done(e, at);
    }
    before += total;
  }
  if (threadIdx.x == 0) a.offsets[a.E] = before;
}

__device__ __forceinline__ void place(const spec::MoeDispatchArgs& a, int64_t first,
                                      const int* tile, int count, int64_t e, int next) {
  walk_tile(tile, count, [&](int i, int expert) {
    if (expert == e) a.row[first + i] = next++;
  });
}
__device__ __forceinline__ void place_unused(const spec::MoeDispatchArgs& a, int64_t first,
                                             const int* tile, int limit) {
  const int64_t slots = a.T * a.K;
  for (int i = static_cast<int>(threadIdx.x); i < limit && first + i < slots;
       i += static_cast<int>(blockDim.x))
    if (tile[i] < 0) a.row[first + i] = -1;
}

__global__ void __launch_bounds__(kScanThreads) plan_small_kernel(spec::MoeDispatchArgs a) {
  V3B_DYNAMIC_SHARED(shared);
  int* tile = reinterpret_cast<int*>(shared);  // [kSmall]
  int* scratch = tile + kSmall;
  const int count = load_tile(a, 0, kSmall, tile);
  offsets_of(
      a, scratch,
      [&](int64_t e) {
        int n = 0;
        walk_tile(tile, count, [&](int, int expert) { n += expert == e; });
        return n;
      },
      [&](int64_t e, int at) { place(a, 0, tile, count, e, at); });
  place_unused(a, 0, tile, kSmall);
}

__global__ void __launch_bounds__(kPlanThreads)
    count_kernel(spec::MoeDispatchArgs a, int* counts) {  // [tiles, E]
  V3B_DYNAMIC_SHARED(shared);
  int* tile = reinterpret_cast<int*>(shared);
  const int count = load_tile(a, static_cast<int64_t>(blockIdx.x) * kTile, kTile, tile);
  for (int64_t e = threadIdx.x; e < a.E; e += kPlanThreads) {
    int n = 0;
    walk_tile(tile, count, [&](int, int expert) { n += expert == e; });
    counts[static_cast<int64_t>(blockIdx.x) * a.E + e] = n;
  }
}
// counts [tile][e] becomes the first row of expert e's slots in that tile.
__global__ void __launch_bounds__(kScanThreads)
    scan_kernel(spec::MoeDispatchArgs a, int* counts, int tiles) {
  V3B_DYNAMIC_SHARED(shared);
  offsets_of(
      a, reinterpret_cast<int*>(shared),
      [&](int64_t e) {
        int n = 0;
#pragma unroll 8
        for (int t = 0; t < tiles; ++t) n += counts[t * a.E + e];
        return n;
      },
      [&](int64_t e, int at) {
        for (int t = 0; t < tiles; t += 8) {  // 8 loads in flight
          int n[8];
#pragma unroll
          for (int i = 0; i < 8; ++i) n[i] = t + i < tiles ? counts[(t + i) * a.E + e] : 0;
#pragma unroll
          for (int i = 0; i < 8; ++i) {
            if (t + i < tiles) counts[(t + i) * a.E + e] = at;
            at += n[i];
          }
        }
      });
}
__global__ void __launch_bounds__(kPlanThreads)
    place_kernel(spec::MoeDispatchArgs a, const int* starts) {
  V3B_DYNAMIC_SHARED(shared);
  int* tile = reinterpret_cast<int*>(shared);
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kTile;
  const int count = load_tile(a, first, kTile, tile);
  for (int64_t e = threadIdx.x; e < a.E; e += kPlanThreads)
    place(a, first, tile, count, e, starts[static_cast<int64_t>(blockIdx.x) * a.E + e]);
  place_unused(a, first, tile, kTile);
}

// served[i] = idx[i], or -1 where `capacity` slots of the expert go before slot i.
__global__ void __launch_bounds__(kPlanThreads)
    capacity_kernel(spec::MoeCapacityArgs a, int32_t* served) {
  V3B_DYNAMIC_SHARED(shared);
  int* expert = reinterpret_cast<int*>(shared);                  // [kTile]
  uint32_t* gate = reinterpret_cast<uint32_t*>(shared) + kTile;  // [kTile]
  const bool by_gate = a.drop_policy == spec::DropPolicy::prob,
             by_choice = a.drop_policy == spec::DropPolicy::slot;
  const int64_t slots = a.T * a.K;
  const int64_t mine = static_cast<int64_t>(blockIdx.x) * kPlanThreads + threadIdx.x;
  const int e = mine < slots ? a.idx[mine] : -1;
  const uint32_t key = by_gate && mine < slots ? order_key(a.weight[mine]) : 0;
  const int64_t choice = mine % a.K;
  int64_t before = 0;
  for (int64_t first = 0; first < slots; first += kTile) {
    const int count = static_cast<int>(min(slots - first, static_cast<int64_t>(kTile)));
    __syncthreads();
    for (int i = static_cast<int>(threadIdx.x); i < count; i += kPlanThreads) {
      expert[i] = a.idx[first + i];
      gate[i] = by_gate ? order_key(a.weight[first + i]) : 0;
    }
    __syncthreads();
    if (e < 0) continue;
    for (int i = 0; i < count; ++i) {
      if (expert[i] != e) continue;
      const int64_t other = first + i;
      if (by_gate)
        before += gate[i] > key || (gate[i] == key && other < mine);
      else if (by_choice)
        before += other % a.K < choice || (other % a.K == choice && other < mine);
      else
        before += other < mine;
    }
  }
  if (mine < slots) served[mine] = before < a.capacity ? e : -1;
}

// Token blockIdx.x, units of the row blockIdx.y * 4 * 256 ...
template <class Unit>
__global__ void __launch_bounds__(kPlanThreads)
    gather_kernel(spec::MoeDispatchArgs a, int64_t units) {
  constexpr int kEach = 4;
  const int64_t t = blockIdx.x;
  const int64_t first = static_cast<int64_t>(blockIdx.y) * kPlanThreads * kEach + threadIdx.x;
  const Unit* from = static_cast<const Unit*>(a.x) + t * units;
  Unit v[kEach];
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
    const int64_t at = first + i * kPlanThreads;
    if (at >= units) continue;
    if constexpr (sizeof(Unit) == 16)
      v[i] = load16(from + at);
    else
      v[i] = from[at];
  }
  for (int64_t k = 0; k < a.K; ++k) {
    const int64_t row = a.row[t * a.K + k];
    if (row < 0) continue;
    Unit* to = static_cast<Unit*>(a.rows) + row * units;
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      const int64_t at = first + i * kPlanThreads;
      if (at >= units) continue;
      if constexpr (sizeof(Unit) == 16)
        store16(to + at, v[i]);
      else
        to[at] = v[i];
    }
  }
}

template <class Unit>
void gather(const spec::MoeDispatchArgs& a, int64_t row_bytes, CudaStream stream) {
  const int64_t units = row_bytes / static_cast<int64_t>(sizeof(Unit)), each = 4 * kPlanThreads;
  launch(gather_kernel<Unit>,
         {dim3(static_cast<unsigned>(a.T), static_cast<unsigned>((units + each - 1) / each)),
          kPlanThreads, 0, stream},
         a, units);
}

int64_t tiles_of(const spec::MoeDispatchArgs& a) { return (a.T * a.K + kTile - 1) / kTile; }

}  // namespace

int64_t moe_dispatch_cuda_scratch_bytes(const spec::MoeDispatchArgs& a) {
  return (a.T * a.K <= kSmall ? 0 : tiles_of(a) * a.E * 4) + (a.capacity > 0 ? a.T * a.K * 4 : 0);
}

void moe_capacity_cuda_simt(const spec::MoeCapacityArgs& a, int32_t* served, CudaStream stream) {
  if (a.T * a.K == 0) return;
  launch(capacity_kernel,
         {dim3(static_cast<unsigned>((a.T * a.K + kPlanThreads - 1) / kPlanThreads)), kPlanThreads,
          kTile * 8, stream},
         a, served);
}

void moe_dispatch_cuda_simt(const spec::MoeDispatchArgs& args, void* scratch, CudaStream stream) {
  spec::MoeDispatchArgs a = args;
  if (a.capacity > 0 && a.T * a.K > 0) {
    int32_t* served = static_cast<int32_t*>(scratch);
    scratch = served + a.T * a.K;
    moe_capacity_cuda_simt({a.T, a.E, a.K, a.idx, a.weight, a.capacity, a.drop_policy, nullptr},
                           served, stream);
    a.idx = served;
  }
  constexpr int kScanShared = 34 * 4;
  if (a.T * a.K <= kSmall) {
    const int threads = static_cast<int>(a.E >= kScanThreads ? kScanThreads : (a.E + 31) / 32 * 32);
    launch(plan_small_kernel, {dim3(1), threads, kSmall * 4 + kScanShared, stream}, a);
  } else {
    const unsigned tiles = static_cast<unsigned>(tiles_of(a));
    int* counts = static_cast<int*>(scratch);
    launch(count_kernel, {dim3(tiles), kPlanThreads, kTile * 4, stream}, a, counts);
    launch(scan_kernel, {dim3(1), kScanThreads, kScanShared, stream}, a, counts,
           static_cast<int>(tiles));
    launch(place_kernel, {dim3(tiles), kPlanThreads, kTile * 4, stream}, a,
           static_cast<const int*>(counts));
  }
  const int64_t row = a.d * spec::dtype_bytes(a.dtype);
  if (a.rows == nullptr || row == 0 || a.T == 0) return;
  if (row % 16 == 0 && aligned16(a.x, a.rows))
    gather<uint4>(a, row, stream);
  else if (row % 4 == 0)
    gather<uint32_t>(a, row, stream);
  else
    gather<uint16_t>(a, row, stream);
}

}  // namespace v3b::kern
