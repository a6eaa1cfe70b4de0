// Causal attention on tensor cores (SPEC 1.5, 1.7), in the manner of FlashAttention-2: a block takes 64 x MT query rows
// of one head, four warps of 16 x MT rows each; K and V tiles of 64 or 48 keys, one buffer each: V arrives while the scores are
// computed, the next K during softmax and P V. Scores, row maxima and sums stay in registers, P never leaves them.
// Blocks with the most keys start first. Rows of shared memory are padded by 16 bytes (no bank conflicts).
//   DQ, DV: d_qk and d_v rounded up (zeros in shared memory; nothing is padded in global memory).
//   MT 2 halves the shared memory traffic a FLOP (320 columns: 160 KiB a 128 x 64 tile of 5.2 MFLOP), MT 1 fills the
//   device at small sizes.
// Bound, H100: 2 (d_qk + d_v) FLOP a pair and head at mma.sync's roof, about 0.62 x 990 TFLOP/s; bytes are 1/100 of that
// from 512 keys on.
#include "kernels/attention/attention_tile.cuh"
#include "kernels/attention/flash_prefill.h"
#include "kernels/core/cuda_device.cuh"
#include "model/error.h"

namespace v3b::kern {
namespace {

using namespace dev;

constexpr int kThreads = 128, kWarps = kThreads / 32;

struct Params {
  FlashArgs a;
  int T, s0, keys;  // keys: max(0, s0 + T)
  float scale2;
  bool fast_q, fast_k, fast_v, pairs;
};

template <int DQ, int DV, int MT>
struct Tile {
  static constexpr int kRows = 16 * MT * kWarps;
  static constexpr int kKeys = MT == 2 ? 48 : 64;  // of a tile: 64 would spill
  static constexpr int kQK = DQ + 8, kV = DV + 8;  // strides
  static constexpr int64_t kShared = 2 * (kRows * kQK + kKeys * (kQK + kV));
};

template <int DQ, int DV, int MT>
__global__ void __launch_bounds__(kThreads) flash_prefill_kernel(Params p) {
  using X = Tile<DQ, DV, MT>;
  constexpr int kKeys = X::kKeys;
  V3B_DYNAMIC_SHARED(shared);
  bf16* sq = reinterpret_cast<bf16*>(shared);
  bf16* sk = sq + X::kRows * X::kQK;
  bf16* sv = sk + kKeys * X::kQK;
  const FlashArgs& a = p.a;
  const int tid = static_cast<int>(threadIdx.x), lane = lane_id(), g = lane >> 2, t = lane & 3;
  const int64_t h = blockIdx.y;
  const int row0 = static_cast<int>(gridDim.x - 1 - blockIdx.x) * X::kRows;
  const int d1 = static_cast<int>(a.d1), d2 = static_cast<int>(a.d2), d_v = static_cast<int>(a.d_v);
  const bf16* k1 = a.k1 + h / a.group * a.k1_head;
  const bf16* v = a.v + h / a.group * a.v_head;

  const auto load_k = [&](int j) {
    for (int i = tid; i < kKeys * (DQ / 8); i += kThreads) {
      const int r = i / (DQ / 8), c = i % (DQ / 8);
      const bool valid = j + r < p.keys;
      const int64_t row = valid ? j + r : 0;
      load_chunk2(sk + r * X::kQK + 8 * c, k1 + row * a.k1_row, d1, a.k2 + row * a.k2_row, d2,
                  8 * c, valid, p.fast_k);
    }
  };
  const auto load_v = [&](int j) {
    for (int i = tid; i < kKeys * (DV / 8); i += kThreads) {
      const int r = i / (DV / 8), c = i % (DV / 8);
      const bool valid = j + r < p.keys;
      load_chunk(sv + r * X::kV + 8 * c, v + static_cast<int64_t>(valid ? j + r : 0) * a.v_row,
                 8 * c, d_v, valid, p.fast_v);
    }
  };

  // Rows of this block see keys below `end`; all of them see those below `all`.
  const int last_row = min(row0 + X::kRows, p.T) - 1;
  const int end = min(p.keys, p.s0 + last_row + 1), all = min(p.keys, p.s0 + row0 + 1);
  for (int i = tid; i < X::kRows * (DQ / 8); i += kThreads) {
    const int r = i / (DQ / 8), c = i % (DQ / 8);
    const bool valid = row0 + r < p.T;
    load_chunk(sq + r * X::kQK + 8 * c,
               a.q + static_cast<int64_t>(valid ? row0 + r : 0) * a.q_row + h * (d1 + d2), 8 * c,
               d1 + d2, valid, p.fast_q);
  }
  if (end > 0) load_k(0);
  cp_async_commit();

  float o[MT][DV / 8][4] = {};
  float m[MT][2], l[MT][2] = {};
#pragma unroll
  for (int mt = 0; mt < MT; ++mt) m[mt][0] = m[mt][1] = -INFINITY;
  const bf16* my_q = sq + (warp_id() * 16 * MT + (lane & 15)) * X::kQK + 8 * (lane >> 4);
  const bf16* my_k = sk + (((lane >> 4) << 3) + (lane & 7)) * X::kQK + 8 * ((lane >> 3) & 1);
  const bf16* my_v = sv + (lane & 15) * X::kV + 8 * (lane >> 4);

  for (int j = 0; j < end; j += kKeys) {
    cp_async_wait<0>();
    __syncthreads();  // K is there; everyone is done with the V before it
    load_v(j);
    cp_async_commit();

    float s[MT][kKeys / 8][4] = {};
#pragma unroll
    for (int kk = 0; kk < DQ / 16; ++kk) {
      uint32_t q[MT][4];
#pragma unroll
      for (int mt = 0; mt < MT; ++mt) ldmatrix_x4(q[mt], my_q + 16 * mt * X::kQK + 16 * kk);
#pragma unroll
      for (int n = 0; n < kKeys / 16; ++n) {
        uint32_t b[4];
        ldmatrix_x4(b, my_k + 16 * n * X::kQK + 16 * kk);
#pragma unroll
        for (int mt = 0; mt < MT; ++mt) {
          mma_bf16(s[mt][2 * n], q[mt], b[0], b[1]);
          mma_bf16(s[mt][2 * n + 1], q[mt], b[2], b[3]);
        }
      }
    }
    cp_async_wait<0>();
    __syncthreads();  // V is there; everyone is done with K
    if (j + kKeys < end) load_k(j + kKeys);
    cp_async_commit();

    if (j + kKeys > all) {  // the diagonal, or the last keys
#pragma unroll
      for (int mt = 0; mt < MT; ++mt)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int row = row0 + warp_id() * 16 * MT + 16 * mt + g + 8 * half;
          const int limit = min(p.keys, p.s0 + row + 1) - j;
#pragma unroll
          for (int n = 0; n < kKeys / 8; ++n)
#pragma unroll
            for (int e = 0; e < 2; ++e)
              if (8 * n + 2 * t + e >= limit) s[mt][n][2 * half + e] = -INFINITY;
        }
    }
#pragma unroll
    for (int mt = 0; mt < MT; ++mt)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float top = -INFINITY;
#pragma unroll
        for (int n = 0; n < kKeys / 8; ++n)
          top = fmaxf(top, fmaxf(s[mt][n][2 * half], s[mt][n][2 * half + 1]));
        const float now = fmaxf(m[mt][half], quad_max(top) * p.scale2);
        const float base = finite_or_zero(now), alpha = fast_exp2(m[mt][half] - base);
        m[mt][half] = now;
        float sum = 0;
#pragma unroll
        for (int n = 0; n < kKeys / 8; ++n)
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            float& x = s[mt][n][2 * half + e];
            x = fast_exp2(x * p.scale2 - base);
            sum += x;
          }
        l[mt][half] = l[mt][half] * alpha + sum;
#pragma unroll
        for (int n = 0; n < DV / 8; ++n) {
          o[mt][n][2 * half] *= alpha;
          o[mt][n][2 * half + 1] *= alpha;
        }
      }
#pragma unroll
    for (int kk = 0; kk < kKeys / 16; ++kk) {
      uint32_t pa[MT][4];
#pragma unroll
      for (int mt = 0; mt < MT; ++mt)
#pragma unroll
        for (int n = 0; n < 2; ++n)
#pragma unroll
          for (int half = 0; half < 2; ++half)
            pa[mt][2 * n + half] =
                pack_bf16(s[mt][2 * kk + n][2 * half], s[mt][2 * kk + n][2 * half + 1]);
#pragma unroll
      for (int n = 0; n < DV / 16; ++n) {
        uint32_t b[4];
        ldmatrix_x4_trans(b, my_v + 16 * kk * X::kV + 16 * n);
#pragma unroll
        for (int mt = 0; mt < MT; ++mt) {
          mma_bf16(o[mt][2 * n], pa[mt], b[0], b[1]);
          mma_bf16(o[mt][2 * n + 1], pa[mt], b[2], b[3]);
        }
      }
    }
  }
  cp_async_wait<0>();

#pragma unroll
  for (int mt = 0; mt < MT; ++mt)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float sum = quad_sum(l[mt][half]);
      const int row = row0 + warp_id() * 16 * MT + 16 * mt + g + 8 * half;
      if (row >= p.T) continue;
      const bool none = sum == 0.0f;
      const float inverse = none ? 0.0f : 1.0f / sum;
      bf16* out = a.o + static_cast<int64_t>(row) * a.o_row + h * d_v;
#pragma unroll
      for (int n = 0; n < DV / 8; ++n)
        store_pair(out, 8 * n + 2 * t, d_v, p.pairs, o[mt][n][2 * half] * inverse,
                   o[mt][n][2 * half + 1] * inverse);
      if (a.lse != nullptr && t == 0) {
        const float empty = a.empty_lse == spec::EmptyLse::pos_inf ? INFINITY : -INFINITY;
        a.lse[row * a.n_h + h] = none ? empty : (m[mt][half] + log2f(sum)) * kLn2;
      }
    }
}

bool aligned(const void* p, int64_t bytes) { return reinterpret_cast<uintptr_t>(p) % bytes == 0; }

template <int DQ, int DV, int MT>
void run(const Params& p, CudaStream stream) {
  using X = Tile<DQ, DV, MT>;
  launch(flash_prefill_kernel<DQ, DV, MT>,
         {dim3(static_cast<unsigned>((p.a.T + X::kRows - 1) / X::kRows),
               static_cast<unsigned>(p.a.n_h)),
          kThreads, X::kShared, stream},
         p);
}

}  // namespace

void flash_prefill(const FlashArgs& a, CudaStream stream) {
  if (a.T <= 0 || a.n_h <= 0) return;
  const int64_t d_qk = a.d1 + a.d2;
  if (d_qk > kFlashMost || a.d_v > kFlashMost)
    throw Error(ExitCode::usage, "head dimensions above 256", "CUDA attention");
  Params p{};
  p.a = a;
  p.T = static_cast<int>(a.T);
  p.s0 = static_cast<int>(a.s0);
  p.keys = p.s0 + p.T > 0 ? p.s0 + p.T : 0;
  p.scale2 = static_cast<float>(a.scale * 1.44269504088896340736);
  p.fast_q = aligned(a.q, 16) && d_qk % 8 == 0 && a.q_row % 8 == 0;
  p.fast_k = aligned(a.k1, 16) && a.d1 % 8 == 0 && a.k1_row % 8 == 0 && a.k1_head % 8 == 0 &&
             (a.d2 == 0 || (aligned(a.k2, 16) && a.d2 % 8 == 0 && a.k2_row % 8 == 0));
  p.fast_v = aligned(a.v, 16) && a.d_v % 8 == 0 && a.v_row % 8 == 0 && a.v_head % 8 == 0;
  p.pairs = aligned(a.o, 4) && a.d_v % 2 == 0 && a.o_row % 2 == 0;
  // 128 rows a block where that still makes two blocks an SM.
  const bool wide = (a.T + 127) / 128 * a.n_h >= 2 * static_cast<int64_t>(cuda_device().sms);
  if (d_qk <= 64 && a.d_v <= 64)
    run<64, 64, 1>(p, stream);
  else if (d_qk <= 128 && a.d_v <= 128)
    wide ? run<128, 128, 2>(p, stream) : run<128, 128, 1>(p, stream);
  else if (d_qk <= 192 && a.d_v <= 128)
    wide ? run<192, 128, 2>(p, stream) : run<192, 128, 1>(p, stream);
  else
    run<256, 256, 1>(p, stream);
}

}  // namespace v3b::kern
