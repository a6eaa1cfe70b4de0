// Absorbed MLA decode (SPEC 1.8) on the paged latent cache with split-KV. A block takes MR rows (heads x s_q of one
// sequence) and the keys of one part (split_schedule.cuh); a tile of NK cache rows [NK x 576] in shared memory serves
// the scores (576 columns) and, its first 512 columns, P V. Warps share a tile twice: for the scores as MR/16 x warps
// of keys, for P V by columns (512 / warps each, all MR rows), so P goes through shared memory.
//   MR 64: 8 warps, 128 accumulators a thread; NK 64 (two stages, 226 KiB: sm_90) or 32 (two stages, 151 KiB: sm_80).
//   MR 16: 4 warps, 64 accumulators, NK 32, two stages, 92 KiB: two blocks an SM on sm_90.
// Q stays in shared memory. 8-bit records: raw bytes arrive in the second stage and become bf16 in the first.
// Chunks of 16 bytes are swizzled by their row (chunk ^ row % 8): no bank conflicts in ldmatrix, no padding.
// Bound, H100: 128 heads are 278 kFLOP for 1152 bytes a key, mma.sync's roof (0.62 x 990 TFLOP/s) is then 2.6 TB/s of
// cache; shared memory traffic (560 KiB a tile of 64 x 64) allows 78% of that. 16 heads: 34.8 kFLOP a key, bytes.
#include "kernels/attention/attention_cuda.h"
#include "kernels/attention/attention_tile.cuh"
#include "kernels/attention/latent_row.cuh"
#include "kernels/attention/split_merge.h"
#include "kernels/attention/split_schedule.cuh"
#include "kernels/core/cuda_device.cuh"

namespace v3b::kern {
namespace {

using namespace dev;

constexpr int kDC = 512, kDR = 64, kD = kDC + kDR, kChunks = kD / 8, kLatentChunks = kDC / 8;

struct Params {
  spec::MlaDecodeArgs a;
  SplitSchedule schedule;
  float* partial;
  float* lse2;
  int64_t row_bytes;
  bool fast_q, fast_cache, record;
};

template <int MR, int NK>
struct Tile {
  static constexpr int kThreads = MR == 64 ? 256 : 128, kWarps = kThreads / 32;
  static constexpr int kWarpsM = MR / 16, kWarpsN = kWarps / kWarpsM;
  static constexpr int kKeys = NK / kWarpsN;     // of a warp's scores
  static constexpr int kColumns = kDC / kWarps;  // of a warp's P V
  static constexpr int kPStride = NK + 8;        // elements
  static constexpr int kStage = NK * kD;
  static constexpr int kLoaders = kThreads / 8;  // rows of one pass: eight threads a row
  static constexpr int64_t kShared = 2 * (MR * kD + 2 * kStage + MR * kPStride) + 4 * kWarpsN * MR;
  static_assert(kKeys == 8 || kKeys % 16 == 0);
  static_assert(NK % kLoaders == 0 && kColumns % 16 == 0);
};

__device__ __forceinline__ bf16* chunk_at(bf16* tile, int row, int chunk) {
  return tile + row * kD + 8 * (chunk ^ (row & 7));
}
__device__ __forceinline__ const bf16* chunk_at(const bf16* tile, int row, int chunk) {
  return tile + row * kD + 8 * (chunk ^ (row & 7));
}

// Latent and rope part of one row lie apart in the tile (columns 0.. and 512..), side by side in memory.
__device__ __forceinline__ void load_row_chunk(bf16* to, const bf16* row, int chunk, int d_c,
                                               int d_r, bool valid, bool fast) {
  const bool rope = chunk >= kLatentChunks;
  load_chunk(to, rope ? row + d_c : row, rope ? 8 * (chunk - kLatentChunks) : 8 * chunk,
             rope ? d_r : d_c, valid, fast);
}

__device__ __forceinline__ int64_t cache_row(const Params& p, const int32_t* table, int j) {
  const int page = static_cast<int>(p.a.page);
  return static_cast<int64_t>(table[j / page]) * p.a.page + j % page;
}

// Keys [j, j + NK) of a bf16 cache, or of records that cannot be copied in 16-byte units. Rows at and past `end` are
// zeros: neither they nor their block ids are read.
template <int MR, int NK>
__device__ void load_keys(const Params& p, const int32_t* table, int j, int end, bf16* stage) {
  using X = Tile<MR, NK>;
  const int d_c = static_cast<int>(p.a.d_c), d_r = static_cast<int>(p.a.d_r);
  const int part = static_cast<int>(threadIdx.x) & 7;
  for (int r = static_cast<int>(threadIdx.x) >> 3; r < NK; r += X::kLoaders) {
    const bool valid = j + r < end;
    const uint8_t* row = static_cast<const uint8_t*>(p.a.cache) +
                         (valid ? cache_row(p, table, j + r) * p.row_bytes : 0);
    if (!p.record) {
#pragma unroll
      for (int c = 0; c < kChunks / 8; ++c)
        load_row_chunk(chunk_at(stage, r, 8 * c + part), reinterpret_cast<const bf16*>(row),
                       8 * c + part, d_c, d_r, valid, p.fast_cache);
      continue;
    }
    for (int c = part; c < kChunks; c += 8) {
      const int first = c < kLatentChunks ? 8 * c : d_c + 8 * (c - kLatentChunks);
      const int limit = c < kLatentChunks ? d_c : d_c + d_r;
      bf16* to = chunk_at(stage, r, c);
      for (int e = 0; e < 8; ++e)
        to[e] =
            valid && first + e < limit ? round_bf16(record_element(row, first + e, d_c)) : bf16{0};
    }
  }
}
// Records as they are, 16 bytes at a time, and then from there to bf16.
template <int MR, int NK>
__device__ void load_raw(const Params& p, const int32_t* table, int j, int end, uint8_t* raw) {
  using X = Tile<MR, NK>;
  const int units = static_cast<int>(p.row_bytes / 16);
  for (int r = static_cast<int>(threadIdx.x) >> 3; r < NK; r += X::kLoaders) {
    if (j + r >= end) continue;
    const uint8_t* row =
        static_cast<const uint8_t*>(p.a.cache) + cache_row(p, table, j + r) * p.row_bytes;
    for (int c = static_cast<int>(threadIdx.x) & 7; c < units; c += 8)
      cp_async16(raw + r * p.row_bytes + 16 * c, row + 16 * c);
  }
}
template <int MR, int NK>
__device__ void unpack_raw(const Params& p, int valid_rows, const uint8_t* raw, bf16* stage) {
  using X = Tile<MR, NK>;
  const int d_c = static_cast<int>(p.a.d_c), d_r = static_cast<int>(p.a.d_r);
  const int part = static_cast<int>(threadIdx.x) & 7;
  const int rope_at = d_c + 4 * ((d_c + 127) / 128);
  for (int r = static_cast<int>(threadIdx.x) >> 3; r < NK; r += X::kLoaders) {
    const uint8_t* row = raw + r * p.row_bytes;
    const bool valid = r < valid_rows;
#pragma unroll
    for (int i = 0; i < kChunks / 8; ++i) {
      const int c = 8 * i + part;
      uint4 v = make_uint4(0, 0, 0, 0);
      if (c < kLatentChunks) {
        if (valid && 8 * c < d_c) {
          const float scale = *reinterpret_cast<const float*>(row + d_c + 4 * (c / 16));
          const uint2 codes = *reinterpret_cast<const uint2*>(row + 8 * c);
          const auto two = [&](uint32_t w) {
            const float2 f = unpack_e4m3(static_cast<uint16_t>(w));
            return pack_bf16(f.x * scale, f.y * scale);
          };
          v = make_uint4(two(codes.x & 0xffffu), two(codes.x >> 16), two(codes.y & 0xffffu),
                         two(codes.y >> 16));
        }
      } else if (valid && 8 * (c - kLatentChunks) < d_r) {
        v = *reinterpret_cast<const uint4*>(row + rope_at + 16 * (c - kLatentChunks));
      }
      *reinterpret_cast<uint4*>(chunk_at(stage, r, c)) = v;
    }
  }
}

// A block's state between tiles. Score rows: wm * 16 + g and + 8 of this thread; P V rows: those of every 16.
template <int MR>
struct State {
  float acc[MR / 16][kDC / (MR == 64 ? 8 : 4) / 8][4];
  float m[MR / 16][2];  // running maxima in units of log2
  float l[2];           // this thread's part of the sums of its score rows
};

// s[n][.] += q k^T over 32 columns from chunk `c` on.
template <int KEYS>
__device__ __forceinline__ void scores_step(const bf16* q, const bf16* k, int m0, int n0, int c,
                                            float (&s)[2][KEYS / 8][4]) {
  const int lane = lane_id();
  uint32_t a[2][4];
#pragma unroll
  for (int h = 0; h < 2; ++h)
    ldmatrix_x4(a[h], chunk_at(q, m0 + (lane & 15), c + 2 * h + (lane >> 4)));
  if constexpr (KEYS == 8) {
    uint32_t b[4];
    ldmatrix_x4(b, chunk_at(k, n0 + (lane & 7), c + (lane >> 3)));
    mma_bf16(s[0][0], a[0], b[0], b[1]);
    mma_bf16(s[1][0], a[1], b[2], b[3]);
  } else {
#pragma unroll
    for (int n = 0; n < KEYS / 16; ++n)
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        uint32_t b[4];
        ldmatrix_x4(b, chunk_at(k, n0 + 16 * n + ((lane >> 4) << 3) + (lane & 7),
                                c + 2 * h + ((lane >> 3) & 1)));
        mma_bf16(s[0][2 * n], a[h], b[0], b[1]);
        mma_bf16(s[0][2 * n + 1], a[h], b[2], b[3]);
      }
  }
}

template <int MR, int NK>
__device__ __forceinline__ void compute_tile(const Params& p, const bf16* q, const bf16* k,
                                             bf16* sp, float* smax, int j, int first_row,
                                             int length, State<MR>& st) {
  using X = Tile<MR, NK>;
  const int lane = lane_id(), g = lane >> 2, t = lane & 3;
  const int wm = warp_id() % X::kWarpsM, wn = warp_id() / X::kWarpsM;
  const int m0 = 16 * wm, n0 = X::kKeys * wn, d_c = static_cast<int>(p.a.d_c);
  const float scale2 = static_cast<float>(p.a.scale) * kLog2e;

  float s[2][X::kKeys / 8][4] = {};  // [1]: a second chain where a warp has one tile of keys
#pragma unroll 2
  for (int c = 0; 8 * c < d_c; c += 4) scores_step<X::kKeys>(q, k, m0, n0, c, s);
#pragma unroll
  for (int c = kLatentChunks; c < kChunks; c += 4) scores_step<X::kKeys>(q, k, m0, n0, c, s);

  // Row r sees rows < length - s_q + r / n_h + 1 of the cache.
  float top[2] = {-INFINITY, -INFINITY};
  int limit[2];
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int row = first_row + m0 + g + 8 * h;
    limit[h] = length - static_cast<int>(p.a.s_q) + row / static_cast<int>(p.a.n_h) + 1;
    limit[h] = min(limit[h], length);  // rows past the last one
  }
#pragma unroll
  for (int n = 0; n < X::kKeys / 8; ++n)
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      float& x = s[0][n][e];
      if constexpr (X::kKeys == 8) x += s[1][n][e];
      x = j + n0 + 8 * n + 2 * t + (e & 1) < limit[e >> 1] ? x * scale2 : -INFINITY;
      top[e >> 1] = fmaxf(top[e >> 1], x);
    }
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    top[h] = quad_max(top[h]);
    if (t == 0) smax[wn * MR + m0 + g + 8 * h] = top[h];
  }
  __syncthreads();

  // New maxima of all rows; the score rows among them.
  float alpha[MR / 16][2], mine[2] = {}, mine_alpha[2] = {};
  bool same = true;
#pragma unroll
  for (int mt = 0; mt < MR / 16; ++mt)
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      float m = st.m[mt][h];
#pragma unroll
      for (int w = 0; w < X::kWarpsN; ++w) m = fmaxf(m, smax[w * MR + 16 * mt + g + 8 * h]);
      alpha[mt][h] = fast_exp2(st.m[mt][h] - finite_or_zero(m));
      same = same && m == st.m[mt][h];
      st.m[mt][h] = m;
      if (mt == wm) mine[h] = finite_or_zero(m), mine_alpha[h] = alpha[mt][h];
    }
#pragma unroll
  for (int h = 0; h < 2; ++h) st.l[h] *= mine_alpha[h];
#pragma unroll
  for (int n = 0; n < X::kKeys / 8; ++n) {
    float e[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      e[i] = fast_exp2(s[0][n][i] - mine[i >> 1]);
      st.l[i >> 1] += e[i];
    }
#pragma unroll
    for (int h = 0; h < 2; ++h)
      *reinterpret_cast<uint32_t*>(sp + (m0 + g + 8 * h) * X::kPStride + n0 + 8 * n + 2 * t) =
          pack_bf16(e[2 * h], e[2 * h + 1]);
  }
  __syncthreads();

  if (!__all_sync(kFullMask, same)) {
#pragma unroll
    for (int mt = 0; mt < MR / 16; ++mt)
#pragma unroll
      for (int n = 0; n < X::kColumns / 8; ++n)
#pragma unroll
        for (int e = 0; e < 4; ++e) st.acc[mt][n][e] *= alpha[mt][e >> 1];
  }
  const int c0 = X::kColumns / 8 * warp_id();  // first chunk of this warp's columns
#pragma unroll
  for (int kk = 0; kk < NK / 16; ++kk) {
    uint32_t a[MR / 16][4];
#pragma unroll
    for (int mt = 0; mt < MR / 16; ++mt)
      ldmatrix_x4(a[mt], sp + (16 * mt + (lane & 15)) * X::kPStride + 16 * kk + 8 * (lane >> 4));
#pragma unroll
    for (int n = 0; n < X::kColumns / 16; ++n) {
      if (8 * (c0 + 2 * n) >= d_c) continue;
      uint32_t b[4];
      ldmatrix_x4_trans(b, chunk_at(k, 16 * kk + (lane & 15), c0 + 2 * n + (lane >> 4)));
#pragma unroll
      for (int mt = 0; mt < MR / 16; ++mt) {
        mma_bf16(st.acc[mt][2 * n], a[mt], b[0], b[1]);
        mma_bf16(st.acc[mt][2 * n + 1], a[mt], b[2], b[3]);
      }
    }
  }
}

// Normalises and writes: to the output if the sequence lies in one part (slot -1), else as a partial result.
template <int MR, int NK>
__device__ void write_rows(const Params& p, float* smax, int b, int slot, int first_row,
                           const State<MR>& st) {
  using X = Tile<MR, NK>;
  const int lane = lane_id(), g = lane >> 2, t = lane & 3;
  const int wm = warp_id() % X::kWarpsM, wn = warp_id() / X::kWarpsM;
  const int rows = static_cast<int>(p.a.s_q * p.a.n_h), d_c = static_cast<int>(p.a.d_c);
  __syncthreads();  // smax is read no more
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const float l = quad_sum(st.l[h]);
    if (t == 0) smax[wn * MR + 16 * wm + g + 8 * h] = l;
  }
  __syncthreads();
  const bool pairs = d_c % 2 == 0;
#pragma unroll
  for (int mt = 0; mt < MR / 16; ++mt)
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int local = 16 * mt + g + 8 * h, row = first_row + local;
      if (row >= rows) continue;
      float l = 0;
#pragma unroll
      for (int w = 0; w < X::kWarpsN; ++w) l += smax[w * MR + local];
      const bool none = l == 0.0f;
      const float inverse = none ? 0.0f : 1.0f / l;
      const int64_t at =
          slot < 0 ? static_cast<int64_t>(b) * rows + row : static_cast<int64_t>(slot) * rows + row;
      const int c0 = X::kColumns * warp_id() + 2 * t;
#pragma unroll
      for (int n = 0; n < X::kColumns / 8; ++n) {
        const float x = st.acc[mt][n][2 * h] * inverse, y = st.acc[mt][n][2 * h + 1] * inverse;
        if (slot < 0)
          store_pair(static_cast<bf16*>(p.a.out) + at * d_c, c0 + 8 * n, d_c, pairs, x, y);
        else
          store_pair(p.partial + at * d_c, c0 + 8 * n, d_c, pairs, x, y);
      }
      if (warp_id() == 0 && t == 0) {
        const float lse2 = none ? -INFINITY : st.m[mt][h] + log2f(l);
        if (slot >= 0) {
          p.lse2[at] = lse2;
        } else if (p.a.lse != nullptr) {
          const float empty = p.a.empty_lse == spec::EmptyLse::pos_inf ? INFINITY : -INFINITY;
          const int64_t i = row / p.a.n_h, head = row % p.a.n_h;
          p.a.lse[(b * p.a.n_h + head) * p.a.s_q + i] = none ? empty : lse2 * kLn2;
        }
      }
    }
}

template <int MR, int NK>
__global__ void __launch_bounds__(Tile<MR, NK>::kThreads,
                                  MR == 16 ? 2 : 1)  // what shared memory holds
    mla_decode_kernel(Params p) {
  using X = Tile<MR, NK>;
  V3B_DYNAMIC_SHARED(shared);
  bf16* q = reinterpret_cast<bf16*>(shared);
  bf16* stages = q + MR * kD;
  bf16* sp = stages + 2 * X::kStage;
  float* smax = reinterpret_cast<float*>(sp + MR * X::kPStride);
  uint8_t* raw = reinterpret_cast<uint8_t*>(stages + X::kStage);
  const int first_row = static_cast<int>(blockIdx.x) * MR;
  const int rows = static_cast<int>(p.a.s_q * p.a.n_h), d_c = static_cast<int>(p.a.d_c),
            d_r = static_cast<int>(p.a.d_r);

  split_walk(
      p.schedule, static_cast<int>(blockIdx.y), [&](int b, int length, int j0, int j1, int slot) {
        const int32_t* table = p.a.block_table + b * p.a.max_blocks;
        const int part = static_cast<int>(threadIdx.x) & 7;
        __syncthreads();  // the previous segment is done with shared memory
        for (int r = static_cast<int>(threadIdx.x) >> 3; r < MR; r += X::kLoaders) {
          const bool valid = first_row + r < rows;
          const bf16* row =
              static_cast<const bf16*>(p.a.q) +
              (static_cast<int64_t>(b) * rows + (valid ? first_row + r : 0)) * (d_c + d_r);
#pragma unroll
          for (int c = 0; c < kChunks / 8; ++c)
            load_row_chunk(chunk_at(q, r, 8 * c + part), row, 8 * c + part, d_c, d_r, valid,
                           p.fast_q);
        }
        State<MR> st;
#pragma unroll
        for (int mt = 0; mt < MR / 16; ++mt) {
          st.m[mt][0] = st.m[mt][1] = -INFINITY;
#pragma unroll
          for (int n = 0; n < X::kColumns / 8; ++n)
#pragma unroll
            for (int e = 0; e < 4; ++e) st.acc[mt][n][e] = 0;
        }
        st.l[0] = st.l[1] = 0;

        const bool staged = p.record && p.fast_cache;
        if (staged)
          load_raw<MR, NK>(p, table, j0, j1, raw);
        else
          load_keys<MR, NK>(p, table, j0, j1, stages);
        cp_async_commit();
        int now = 0;
        for (int j = j0; j < j1; j += NK) {
          cp_async_wait<0>();
          __syncthreads();  // tile j is there, everyone is done with the tile before it
          const bool more = j + NK < j1;
          if (staged) {
            unpack_raw<MR, NK>(p, j1 - j, raw, stages);
            __syncthreads();
            if (more) load_raw<MR, NK>(p, table, j + NK, j1, raw);
          } else if (more) {
            load_keys<MR, NK>(p, table, j + NK, j1, stages + (now ^ 1) * X::kStage);
          }
          cp_async_commit();
          compute_tile<MR, NK>(p, q, stages + now * X::kStage, sp, smax, j, first_row, length, st);
          if (!staged) now ^= 1;
        }
        write_rows<MR, NK>(p, smax, b, slot, first_row, st);
      });
  cp_async_wait<0>();
}

bool aligned16(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

struct Plan {
  int mr, nk, parts;
  int64_t row_tiles;
};
Plan plan(const spec::MlaDecodeArgs& a, int64_t shared_bytes) {
  const int64_t rows = a.s_q * a.n_h;
  if (shared_bytes == 0) shared_bytes = cuda_device().shared_bytes;
  Plan p{};
  p.mr = rows <= 32 ? 16 : 64;
  p.nk = p.mr == 64 && shared_bytes >= Tile<64, 64>::kShared ? 64 : 32;
  p.row_tiles = (rows + p.mr - 1) / p.mr;
  const int an_sm = p.mr == 16 && shared_bytes >= 2 * Tile<16, 32>::kShared ? 2 : 1;
  p.parts = split_parts(p.row_tiles, an_sm, a.B * ((a.max_blocks * a.page + p.nk - 1) / p.nk));
  return p;
}
SplitScratch scratch_of(const spec::MlaDecodeArgs& a, int parts) {
  return {.slots = parts + a.B, .rows = a.s_q * a.n_h, .d = a.d_c};
}

template <int MR, int NK>
void run(const Params& p, const Plan& plan, CudaStream stream) {
  launch(mla_decode_kernel<MR, NK>,
         {dim3(static_cast<unsigned>(plan.row_tiles), static_cast<unsigned>(plan.parts)),
          Tile<MR, NK>::kThreads, Tile<MR, NK>::kShared, stream},
         p);
}

}  // namespace

bool mla_decode_cuda_mma_takes(int64_t d_c, int64_t d_r) { return d_c <= kDC && d_r <= kDR; }

int64_t mla_decode_cuda_mma_scratch_bytes(const spec::MlaDecodeArgs& a, int64_t shared_bytes) {
  return scratch_of(a, plan(a, shared_bytes).parts).bytes();
}

void mla_decode_cuda_mma(const spec::MlaDecodeArgs& a, void* scratch, CudaStream stream,
                         int64_t shared_bytes) {
  if (a.B == 0 || a.s_q * a.n_h == 0) return;
  const Plan pl = plan(a, shared_bytes);
  const SplitScratch s = scratch_of(a, pl.parts);
  Params p{};
  p.a = a;
  p.schedule = {a.cache_seqlens, static_cast<int>(a.B), pl.nk, pl.parts};
  p.partial = s.partial(scratch);
  p.lse2 = s.lse2(scratch);
  p.row_bytes = spec::mla_cache_row_bytes(a.kv_format, a.dtype, a.d_c, a.d_r);
  p.record = a.kv_format != spec::KvFormat::bf16;
  const bool eights = a.d_c % 8 == 0 && a.d_r % 8 == 0;
  p.fast_q = eights && aligned16(a.q);
  p.fast_cache = eights && aligned16(a.cache) && p.row_bytes % 16 == 0;
  if (p.record) p.fast_cache = p.fast_cache && (a.d_c + 4 * ((a.d_c + 127) / 128)) % 16 == 0;
  if (pl.mr == 16)
    run<16, 32>(p, pl, stream);
  else if (pl.nk == 64)
    run<64, 64>(p, pl, stream);
  else
    run<64, 32>(p, pl, stream);
  split_merge({.B = a.B,
               .s_q = a.s_q,
               .n_h = a.n_h,
               .d = a.d_c,
               .tile = pl.nk,
               .parts = pl.parts,
               .dtype = a.dtype,
               .empty_lse = a.empty_lse,
               .lengths = a.cache_seqlens,
               .partial = p.partial,
               .lse2 = p.lse2,
               .out = a.out,
               .lse = a.lse},
              stream);
}

}  // namespace v3b::kern
