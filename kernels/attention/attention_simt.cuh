// Attention without tensor cores: f32, odd dimensions, every cache format; prefill and decode of all kinds from one
// core. A block of 128 threads takes one query row and tiles of 128 keys: one key a thread for the scores (q in shared
// memory), then one output column a thread for P V (p in shared memory). Bound by reading keys from L2 for every row:
// it is the plain version, a checker for the tensor-core kernels and the one for f32.
#pragma once
#include "kernels/attention/attention_cuda.h"
#include "kernels/attention/attention_tile.cuh"
#include "kernels/attention/latent_row.cuh"
#include "kernels/attention/split_merge.h"
#include "kernels/attention/split_schedule.cuh"
#include "kernels/core/cuda_device.cuh"

namespace v3b::kern {
namespace {

using namespace dev;

constexpr int kThreads = 128, kTile = kThreads;
constexpr int kHeld = 8;  // output columns of a thread: d_v <= 1024

// Keys and values of one head, element type T. A key is d1 elements of k1 and then d2 of k2.
struct Keys {
  const void* k1;
  const void* k2;
  const void* v;
  int64_t k1_row, k2_row, v_row;  // elements; of records: bytes in k1_row
  int64_t d1, d2, d_v;
  const int32_t* table;  // null: row j is row j
  int64_t page;
  bool record;  // k1 and v are 8-bit records with d_v latent elements
};
__device__ __forceinline__ int64_t row_of(const Keys& k, int64_t j) {
  return k.table == nullptr ? j : k.table[j / k.page] * k.page + j % k.page;
}
template <class T>
__device__ __forceinline__ float dot(const Keys& k, int64_t row, const float* q) {
  float sum = 0;
  if (k.record) {
    const uint8_t* r = static_cast<const uint8_t*>(k.k1) + row * k.k1_row;
    for (int64_t i = 0; i < k.d1; ++i) sum += q[i] * record_element(r, i, k.d_v);
    return sum;
  }
  const T* r = static_cast<const T*>(k.k1) + row * k.k1_row;
#pragma unroll 4
  for (int64_t i = 0; i < k.d1; ++i) sum += q[i] * as_float(r[i]);
  if (k.d2 > 0) {
    r = static_cast<const T*>(k.k2) + row * k.k2_row;
    for (int64_t i = 0; i < k.d2; ++i) sum += q[k.d1 + i] * as_float(r[i]);
  }
  return sum;
}
template <class T>
__device__ __forceinline__ float value(const Keys& k, int64_t row, int64_t c) {
  if (k.record) return record_element(static_cast<const uint8_t*>(k.k1) + row * k.k1_row, c, k.d_v);
  return as_float(static_cast<const T*>(k.v)[row * k.v_row + c]);
}

struct Shared {
  float *scratch, *p, *q;  // [34], [kTile], [d]
  int64_t* rows;           // [kTile]
};
__device__ Shared carve(uint8_t* shared) {
  Shared s{};
  s.rows = reinterpret_cast<int64_t*>(shared);
  s.p = reinterpret_cast<float*>(s.rows + kTile);
  s.scratch = s.p + kTile;
  s.q = s.scratch + 36;
  return s;
}
int64_t shared_bytes(int64_t d_qk) { return 8 * kTile + 4 * kTile + 4 * 36 + 4 * d_qk; }

struct Row {
  float m = -INFINITY, l = 0;  // maximum in units of log2, sum
  float acc[kHeld] = {};
};
template <class T>
__device__ void load_query(const Shared& s, const T* q, int64_t d) {
  __syncthreads();  // the previous row is done with it
  for (int64_t i = threadIdx.x; i < d; i += kThreads) s.q[i] = as_float(q[i]);
  __syncthreads();
}
// Keys [j0, j1), the same for every thread.
template <class T>
__device__ void attend(const Keys& k, const Shared& s, int64_t j0, int64_t j1, float scale2,
                       Row& r) {
  const int tid = static_cast<int>(threadIdx.x);
  for (int64_t j = j0; j < j1; j += kTile) {
    const int n = static_cast<int>(min(static_cast<int64_t>(kTile), j1 - j));
    float x = -INFINITY;
    if (tid < n) {
      const int64_t row = row_of(k, j + tid);
      s.rows[tid] = row;
      x = dot<T>(k, row, s.q) * scale2;
    }
    const float m = fmaxf(r.m, block_max(x, s.scratch));
    const float alpha = fast_exp2(r.m - finite_or_zero(m));
    const float e = fast_exp2(x - finite_or_zero(m));
    s.p[tid] = e;
    r.l = r.l * alpha + block_sum(e, s.scratch);  // its barriers publish p and rows
    r.m = m;
#pragma unroll
    for (int i = 0; i < kHeld; ++i) {
      const int64_t c = tid + static_cast<int64_t>(i) * kThreads;
      if (c >= k.d_v) continue;
      float sum = r.acc[i] * alpha;
      for (int jj = 0; jj < n; ++jj) sum += s.p[jj] * value<T>(k, s.rows[jj], c);
      r.acc[i] = sum;
    }
    __syncthreads();  // before the next tile writes p and rows
  }
}
template <class O>
__device__ void store_row(const Row& r, O* out, int64_t d_v) {
  const float inverse = r.l == 0.0f ? 0.0f : 1.0f / r.l;
#pragma unroll
  for (int i = 0; i < kHeld; ++i) {
    const int64_t c = threadIdx.x + static_cast<int64_t>(i) * kThreads;
    if (c < d_v) out[c] = from_float<O>(r.acc[i] * inverse);
  }
}
__device__ __forceinline__ float natural_lse(const Row& r, spec::EmptyLse empty) {
  if (r.l == 0.0f) return empty == spec::EmptyLse::pos_inf ? INFINITY : -INFINITY;
  return (r.m + log2f(r.l)) * kLn2;
}

struct Prefill {
  int64_t T, s0, n_h, group, d_qk;
  float scale2;
  spec::EmptyLse empty_lse;
  const void* q;
  Keys keys;               // of head 0
  int64_t k_head, v_head;  // elements between key/value heads
  int64_t q_stride, o_stride;
  void* o;
  float* lse;
};
template <class T>
__global__ void __launch_bounds__(kThreads) prefill_kernel(Prefill p) {
  V3B_DYNAMIC_SHARED(shared);
  const Shared s = carve(shared);
  const int64_t i = blockIdx.x, h = blockIdx.y;
  Keys k = p.keys;
  k.k1 = static_cast<const T*>(k.k1) + h / p.group * p.k_head;
  k.v = static_cast<const T*>(k.v) + h / p.group * p.v_head;
  load_query(s, static_cast<const T*>(p.q) + i * p.q_stride + h * p.d_qk, p.d_qk);
  Row r;
  attend<T>(k, s, 0, p.s0 + i + 1, p.scale2, r);
  store_row(r, static_cast<T*>(p.o) + i * p.o_stride + h * k.d_v, k.d_v);
  if (p.lse != nullptr && threadIdx.x == 0) p.lse[i * p.n_h + h] = natural_lse(r, p.empty_lse);
}
void run(const Prefill& p, spec::DType dtype, CudaStream stream) {
  if (p.T == 0) return;
  const LaunchConfig c{dim3(static_cast<unsigned>(p.T), static_cast<unsigned>(p.n_h)), kThreads,
                       shared_bytes(p.d_qk), stream};
  if (dtype == spec::DType::bf16)
    launch(prefill_kernel<spec::bf16>, c, p);
  else
    launch(prefill_kernel<float>, c, p);
}

struct Decode {
  int64_t s_q, n_h, group, d_qk;
  float scale2;
  spec::EmptyLse empty_lse;
  SplitSchedule schedule;
  const void* q;                             // [B, s_q * n_h, d_qk]
  Keys keys;                                 // of sequence 0, head 0
  int64_t k_batch, k_head, v_batch, v_head;  // elements
  int64_t max_blocks;
  void* o;
  float *lse, *partial, *lse2;
};
template <class T>
__global__ void __launch_bounds__(kThreads, 4) decode_kernel(Decode p) {  // 4: else sm_100 spills
  V3B_DYNAMIC_SHARED(shared);
  const Shared s = carve(shared);
  const auto heads = static_cast<uint32_t>(p.n_h), group = static_cast<uint32_t>(p.group);
  const int64_t row = blockIdx.x, rows = p.s_q * p.n_h, i = blockIdx.x / heads;
  const uint32_t h = blockIdx.x % heads;
  split_walk(
      p.schedule, static_cast<int>(blockIdx.y), [&](int b, int length, int j0, int j1, int slot) {
        Keys k = p.keys;
        k.k1 = static_cast<const T*>(k.k1) + b * p.k_batch + h / group * p.k_head;
        k.v = static_cast<const T*>(k.v) + b * p.v_batch + h / group * p.v_head;
        if (k.table != nullptr) k.table += b * p.max_blocks;
        load_query(s, static_cast<const T*>(p.q) + (b * rows + row) * p.d_qk, p.d_qk);
        Row r;
        attend<T>(k, s, j0, min(static_cast<int64_t>(j1), length - p.s_q + i + 1), p.scale2, r);
        if (slot < 0) {
          store_row(r, static_cast<T*>(p.o) + (b * rows + row) * k.d_v, k.d_v);
          if (p.lse != nullptr && threadIdx.x == 0)
            p.lse[(b * p.n_h + h) * p.s_q + i] = natural_lse(r, p.empty_lse);
        } else {
          const int64_t at = slot * rows + row;
          store_row(r, p.partial + at * k.d_v, k.d_v);
          if (threadIdx.x == 0) p.lse2[at] = r.l == 0.0f ? -INFINITY : r.m + log2f(r.l);
        }
      });
}

int decode_parts(int64_t B, int64_t rows, int64_t max_keys) {
  return split_parts(rows, 8, max_keys > 0 ? B * ((max_keys + kTile - 1) / kTile) : 1 << 20);
}
void run(const Decode& p, int64_t B, spec::DType dtype, CudaStream stream) {
  const int64_t rows = p.s_q * p.n_h;
  if (B == 0 || rows == 0) return;
  const LaunchConfig c{dim3(static_cast<unsigned>(rows), static_cast<unsigned>(p.schedule.parts)),
                       kThreads, shared_bytes(p.d_qk), stream};
  if (dtype == spec::DType::bf16)
    launch(decode_kernel<spec::bf16>, c, p);
  else
    launch(decode_kernel<float>, c, p);
  split_merge({.B = B,
               .s_q = p.s_q,
               .n_h = p.n_h,
               .d = p.keys.d_v,
               .tile = kTile,
               .parts = p.schedule.parts,
               .dtype = dtype,
               .empty_lse = p.empty_lse,
               .lengths = p.schedule.lengths,
               .partial = p.partial,
               .lse2 = p.lse2,
               .out = p.o,
               .lse = p.lse},
              stream);
}

float log2_scale(double scale) { return static_cast<float>(scale * 1.44269504088896340736); }
const void* at_element(const void* p, int64_t i, spec::DType t) {
  return static_cast<const uint8_t*>(p) + i * spec::dtype_bytes(t);
}

SplitScratch scratch_of(const spec::AttentionDecodeArgs& a) {
  return {.slots = decode_parts(a.B, a.n_h, 0) + a.B, .rows = a.n_h, .d = a.d_v};
}
SplitScratch scratch_of(const spec::MlaDecodeArgs& a) {
  const int64_t rows = a.s_q * a.n_h;
  return {.slots = decode_parts(a.B, rows, a.max_blocks * a.page) + a.B, .rows = rows, .d = a.d_c};
}

}  // namespace
}  // namespace v3b::kern
