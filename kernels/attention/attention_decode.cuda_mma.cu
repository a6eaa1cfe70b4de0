// Decode with MHA, GQA, MQA (SPEC 1.5) on tensor cores with split-KV. A block takes 16 heads of one group (fewer: rows of
// zeros) and the keys of one part (split_schedule.cuh). Its four warps take every fourth 16 keys, each with its own
// two-stage pipeline, softmax and accumulators, so that no barrier stands in the loop; at the end they are merged in
// shared memory. Q and P never leave registers.
// Bound, H100: bytes, 2 (d_qk + d_v) a key and key/value head. With one head a group 15 of 16 rows are padding: still
// only 16 FLOP a byte on the tensor cores, 54 TFLOP/s at 3.35 TB/s, so MHA needs no path of its own. 70 KiB of shared
// memory at 128 + 128 (three blocks an SM on sm_90), half of it in flight: 3 x 35 KiB an SM, six times what the latency
// of 3.35 TB/s asks for.
#include "kernels/attention/attention_cuda.h"
#include "kernels/attention/attention_tile.cuh"
#include "kernels/attention/split_merge.h"
#include "kernels/attention/split_schedule.cuh"
#include "kernels/core/cuda_device.cuh"

namespace v3b::kern {
namespace {

using namespace dev;

constexpr int kThreads = 128, kWarps = kThreads / 32;
constexpr int kRows = 16, kKeys = 16;          // heads of a block, keys of a warp's step
constexpr int kScheduleTile = kWarps * kKeys;  // keys that a part is counted in
constexpr int64_t kMost = 256;

// Registers: by itself ptxas takes what as many blocks as fit shared memory leave, and for sm_100, which needs some more
// at 128 and 192, spills. One block fewer there.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
#define V3B_DECODE_BOUNDS __launch_bounds__(kThreads, DQ >= 256 ? 1 : DQ >= 128 ? 2 : 3)
#else
#define V3B_DECODE_BOUNDS __launch_bounds__(kThreads)
#endif

struct Params {
  spec::AttentionDecodeArgs a;
  SplitSchedule schedule;
  float* partial;
  float* lse2;
  int group, group_tiles;  // heads a key/value head, blocks of 16 of them
  bool fast_k, fast_v;
};

template <int DQ, int DV>
struct Tile {
  static constexpr int kQK = DQ + 8, kV = DV + 8;    // strides
  static constexpr int kStage = kKeys * (kQK + kV);  // elements
  static constexpr int64_t kPipeline = 2 * 2 * kStage * kWarps;
  static constexpr int64_t kMerge = 4 * kWarps * kRows * (DV + 2);  // the same memory, later
  static constexpr int64_t kShared = kPipeline > kMerge ? kPipeline : kMerge;
};

template <int DQ, int DV>
__device__ __forceinline__ void load_step(const Params& p, const bf16* k, const bf16* v, int j,
                                          int end, bf16* stage) {
  using X = Tile<DQ, DV>;
  const int d_qk = static_cast<int>(p.a.d_qk), d_v = static_cast<int>(p.a.d_v);
#pragma unroll 4
  for (int i = lane_id(); i < kKeys * (DQ / 8); i += kWarp) {
    const int r = i / (DQ / 8), c = i % (DQ / 8);
    const bool valid = j + r < end;
    load_chunk(stage + r * X::kQK + 8 * c, k + static_cast<int64_t>(valid ? j + r : 0) * p.a.k_row,
               8 * c, d_qk, valid, p.fast_k);
  }
  bf16* sv = stage + kKeys * X::kQK;
#pragma unroll 4
  for (int i = lane_id(); i < kKeys * (DV / 8); i += kWarp) {
    const int r = i / (DV / 8), c = i % (DV / 8);
    const bool valid = j + r < end;
    load_chunk(sv + r * X::kV + 8 * c, v + static_cast<int64_t>(valid ? j + r : 0) * p.a.v_row,
               8 * c, d_v, valid, p.fast_v);
  }
}

template <int DV>
struct State {
  float o[DV / 8][4];
  float m[2], l[2];
};

// One step of 16 keys: scores, softmax, P V.
template <int DQ, int DV>
__device__ __forceinline__ void compute_step(const uint32_t (&q)[DQ / 16][4], const bf16* stage,
                                             int keys, float scale2, State<DV>& st) {
  using X = Tile<DQ, DV>;
  const int lane = lane_id(), t = lane & 3;
  const bf16* my_k = stage + (((lane >> 4) << 3) + (lane & 7)) * X::kQK + 8 * ((lane >> 3) & 1);
  const bf16* my_v = stage + kKeys * X::kQK + (lane & 15) * X::kV + 8 * (lane >> 4);
  float s[2][4] = {};
#pragma unroll
  for (int kk = 0; kk < DQ / 16; ++kk) {
    uint32_t b[4];
    ldmatrix_x4(b, my_k + 16 * kk);
    mma_bf16(s[0], q[kk], b[0], b[1]);
    mma_bf16(s[1], q[kk], b[2], b[3]);
  }
  float alpha[2];
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    float top = -INFINITY;
#pragma unroll
    for (int n = 0; n < 2; ++n)
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        float& x = s[n][2 * h + e];
        x = 8 * n + 2 * t + e < keys ? x * scale2 : -INFINITY;
        top = fmaxf(top, x);
      }
    const float m = fmaxf(st.m[h], quad_max(top));  // finite: a step has at least one key
    alpha[h] = fast_exp2(st.m[h] - m);
    st.m[h] = m;
    st.l[h] *= alpha[h];
#pragma unroll
    for (int n = 0; n < 2; ++n)
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        float& x = s[n][2 * h + e];
        x = fast_exp2(x - m);
        st.l[h] += x;
      }
  }
  if (!__all_sync(kFullMask, alpha[0] == 1.0f && alpha[1] == 1.0f)) {
#pragma unroll
    for (int n = 0; n < DV / 8; ++n)
#pragma unroll
      for (int e = 0; e < 4; ++e) st.o[n][e] *= alpha[e >> 1];
  }
  const uint32_t pa[4] = {pack_bf16(s[0][0], s[0][1]), pack_bf16(s[0][2], s[0][3]),
                          pack_bf16(s[1][0], s[1][1]), pack_bf16(s[1][2], s[1][3])};
#pragma unroll
  for (int n = 0; n < DV / 16; ++n) {
    uint32_t b[4];
    ldmatrix_x4_trans(b, my_v + 16 * n);
    mma_bf16(st.o[2 * n], pa, b[0], b[1]);
    mma_bf16(st.o[2 * n + 1], pa, b[2], b[3]);
  }
}

// The warps' results into one and out: to the output (slot -1) or as a partial result.
template <int DQ, int DV>
__device__ __forceinline__ void merge_warps(const Params& p, float* shared, int b, int slot,
                                            int first_head, int heads, const State<DV>& st) {
  const int lane = lane_id(), g = lane >> 2, t = lane & 3, d_v = static_cast<int>(p.a.d_v);
  float* so = shared + warp_id() * kRows * DV;
  float* sm = shared + kWarps * kRows * DV;  // [warp][row]
  float* sl = sm + kWarps * kRows;
  __syncthreads();  // every warp is done with its stages
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const float l = quad_sum(st.l[h]);
    const int row = g + 8 * h;
#pragma unroll
    for (int n = 0; n < DV / 8; ++n)
      *reinterpret_cast<float2*>(so + row * DV + 8 * n + 2 * t) =
          make_float2(st.o[n][2 * h], st.o[n][2 * h + 1]);
    if (t == 0) {
      sm[warp_id() * kRows + row] = st.m[h];
      sl[warp_id() * kRows + row] = l;
    }
  }
  __syncthreads();
  for (int row = warp_id(); row < heads; row += kWarps) {
    float m = -INFINITY, l = 0, weight[kWarps];
#pragma unroll
    for (int w = 0; w < kWarps; ++w) m = fmaxf(m, sm[w * kRows + row]);
#pragma unroll
    for (int w = 0; w < kWarps; ++w) {
      weight[w] = fast_exp2(sm[w * kRows + row] - finite_or_zero(m));  // 0: the warp had no key
      l += weight[w] * sl[w * kRows + row];
    }
    const bool none = l == 0.0f;
    const float inverse = none ? 0.0f : __fdividef(1.0f, l);
    const int64_t head = first_head + row;
    const int64_t at = static_cast<int64_t>(slot < 0 ? b : slot) * p.a.n_h + head;
    for (int c = lane; c < d_v; c += kWarp) {
      float x = 0;
#pragma unroll
      for (int w = 0; w < kWarps; ++w) x += weight[w] * shared[(w * kRows + row) * DV + c];
      if (slot < 0)
        static_cast<bf16*>(p.a.o)[at * d_v + c] = round_bf16(x * inverse);
      else
        p.partial[at * d_v + c] = x * inverse;
    }
    if (lane == 0) {
      const float lse2 = none ? -INFINITY : m + log2f(l);
      const float empty = p.a.empty_lse == spec::EmptyLse::pos_inf ? INFINITY : -INFINITY;
      if (slot >= 0)
        p.lse2[at] = lse2;
      else if (p.a.lse != nullptr)
        p.a.lse[at] = none ? empty : lse2 * kLn2;
    }
  }
  __syncthreads();  // before the next segment loads
}

template <int DQ, int DV>
__global__ void V3B_DECODE_BOUNDS attention_decode_kernel(Params p) {
  using X = Tile<DQ, DV>;
  V3B_DYNAMIC_SHARED(shared);
  bf16* stages = reinterpret_cast<bf16*>(shared) + 2 * X::kStage * warp_id();
  const int lane = lane_id(), g = lane >> 2, t = lane & 3;
  const int kv_head = static_cast<int>(blockIdx.x) / p.group_tiles;
  const int in_group = static_cast<int>(blockIdx.x) % p.group_tiles * kRows;
  const int first_head = kv_head * p.group + in_group;
  const int heads = min(kRows, p.group - in_group), d_qk = static_cast<int>(p.a.d_qk);
  const float scale2 = static_cast<float>(p.a.scale) * kLog2e;

  split_walk(p.schedule, static_cast<int>(blockIdx.y), [&](int b, int, int j0, int j1, int slot) {
    const bf16* k = static_cast<const bf16*>(p.a.k) + b * p.a.k_batch + kv_head * p.a.k_head;
    const bf16* v = static_cast<const bf16*>(p.a.v) + b * p.a.v_batch + kv_head * p.a.v_head;
    const bf16* q = static_cast<const bf16*>(p.a.q) + (b * p.a.n_h + first_head) * d_qk;
    // Rows g and g + 8, columns 2t and 2t + 8 of every 16: the layout of the product's first operand.
    uint32_t fq[DQ / 16][4];
    const auto two = [&](int row, int c) -> uint32_t {
      if (row >= heads || c >= d_qk) return 0;
      const bf16* x = q + row * d_qk + c;
      return x[0].bits | (c + 1 < d_qk ? static_cast<uint32_t>(x[1].bits) << 16 : 0u);
    };
#pragma unroll
    for (int kk = 0; kk < DQ / 16; ++kk)
#pragma unroll
      for (int e = 0; e < 4; ++e) fq[kk][e] = two(g + 8 * (e & 1), 16 * kk + 2 * t + 8 * (e >> 1));
    State<DV> st;
#pragma unroll
    for (int n = 0; n < DV / 8; ++n)
#pragma unroll
      for (int e = 0; e < 4; ++e) st.o[n][e] = 0;
    st.m[0] = st.m[1] = -INFINITY;
    st.l[0] = st.l[1] = 0;

    int now = 0;
    const int first = j0 + warp_id() * kKeys;
    if (first < j1) load_step<DQ, DV>(p, k, v, first, j1, stages);
    cp_async_commit();
    for (int j = first; j < j1; j += kScheduleTile) {
      cp_async_wait<0>();
      __syncwarp();  // all lanes' rows are there, all are done with the other stage
      if (j + kScheduleTile < j1)
        load_step<DQ, DV>(p, k, v, j + kScheduleTile, j1, stages + (now ^ 1) * X::kStage);
      cp_async_commit();
      compute_step<DQ, DV>(fq, stages + now * X::kStage, j1 - j, scale2, st);
      now ^= 1;
    }
    cp_async_wait<0>();
    merge_warps<DQ, DV>(p, reinterpret_cast<float*>(shared), b, slot, first_head, heads, st);
  });
}

int class_of(const spec::AttentionDecodeArgs& a) {  // which instance
  if (a.d_qk <= 64 && a.d_v <= 64) return 0;
  if (a.d_qk <= 128 && a.d_v <= 128) return 1;
  return a.d_qk <= 192 && a.d_v <= 128 ? 2 : 3;
}
int64_t tiles_of(const spec::AttentionDecodeArgs& a) {
  return (a.n_h / a.n_kv + kRows - 1) / kRows;
}
int parts_of(const spec::AttentionDecodeArgs& a) {
  constexpr int64_t kShared[] = {Tile<64, 64>::kShared, Tile<128, 128>::kShared,
                                 Tile<192, 128>::kShared, Tile<256, 256>::kShared};
  const int64_t fit = cuda_device().shared_bytes / (kShared[class_of(a)] + 1024);
  return split_parts(a.n_kv * tiles_of(a), static_cast<int>(std::clamp<int64_t>(fit, 1, 4)),
                     1 << 20);
}
SplitScratch scratch_of(const spec::AttentionDecodeArgs& a) {
  return {.slots = parts_of(a) + a.B, .rows = a.n_h, .d = a.d_v};
}
bool eights(const void* p, int64_t batch, int64_t head, int64_t row, int64_t d) {
  return reinterpret_cast<uintptr_t>(p) % 16 == 0 && batch % 8 == 0 && head % 8 == 0 &&
         row % 8 == 0 && d % 8 == 0;
}

template <int DQ, int DV>
void run(const Params& p, CudaStream stream) {
  launch(attention_decode_kernel<DQ, DV>,
         {dim3(static_cast<unsigned>(p.a.n_kv * p.group_tiles),
               static_cast<unsigned>(p.schedule.parts)),
          kThreads, Tile<DQ, DV>::kShared, stream},
         p);
}

}  // namespace

bool attention_decode_cuda_mma_takes(int64_t d_qk, int64_t d_v) {
  return d_qk <= kMost && d_v <= kMost;
}
int64_t attention_decode_cuda_mma_scratch_bytes(const spec::AttentionDecodeArgs& a) {
  return scratch_of(a).bytes();
}

void attention_decode_cuda_mma(const spec::AttentionDecodeArgs& a, void* scratch,
                               CudaStream stream) {
  if (a.B == 0 || a.n_h == 0) return;
  const SplitScratch s = scratch_of(a);
  Params p{};
  p.a = a;
  p.schedule = {a.cache_seqlens, static_cast<int>(a.B), kScheduleTile, parts_of(a)};
  p.partial = s.partial(scratch);
  p.lse2 = s.lse2(scratch);
  p.group = static_cast<int>(a.n_h / a.n_kv);
  p.group_tiles = static_cast<int>(tiles_of(a));
  p.fast_k = eights(a.k, a.k_batch, a.k_head, a.k_row, a.d_qk);
  p.fast_v = eights(a.v, a.v_batch, a.v_head, a.v_row, a.d_v);
  switch (class_of(a)) {
    case 0:
      run<64, 64>(p, stream);
      break;
    case 1:
      run<128, 128>(p, stream);
      break;
    case 2:
      run<192, 128>(p, stream);
      break;
    default:
      run<256, 256>(p, stream);
  }
  split_merge({.B = a.B,
               .s_q = 1,
               .n_h = a.n_h,
               .d = a.d_v,
               .tile = kScheduleTile,
               .parts = p.schedule.parts,
               .dtype = a.dtype,
               .empty_lse = a.empty_lse,
               .lengths = a.cache_seqlens,
               .partial = p.partial,
               .lse2 = p.lse2,
               .out = a.o,
               .lse = a.lse},
              stream);
}

}  // namespace v3b::kern
