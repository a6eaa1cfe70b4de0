// CUDA kernels on the host, for checks without a GPU. A block's threads are fibers of one OS thread that switch at
// barriers and warp collectives only, so a missing barrier shows: threads run in ascending order in one launch and in
// descending order in the next, shared memory starts as NaN, cp.async copies land only when waited for, device memory
// starts as NaN, barriers that some thread never reaches end the launch with an error. Not modelled: memory ordering
// between blocks, bank conflicts, clusters, wgmma, TMA, tensor-core rounding (products are summed in fp32, k ascending).
#pragma once
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>

#define __global__ static
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
#define V3B_EMU_VECTOR2(T, N)       \
  struct alignas(2 * sizeof(T)) N { \
    T x, y;                         \
  };                                \
  inline N make_##N(T x, T y) { return {x, y}; }
#define V3B_EMU_VECTOR4(T, N)       \
  struct alignas(4 * sizeof(T)) N { \
    T x, y, z, w;                   \
  };                                \
  inline N make_##N(T x, T y, T z, T w) { return {x, y, z, w}; }
V3B_EMU_VECTOR2(float, float2)
V3B_EMU_VECTOR4(float, float4)
V3B_EMU_VECTOR2(int, int2)
V3B_EMU_VECTOR4(int, int4)
V3B_EMU_VECTOR2(unsigned, uint2)
V3B_EMU_VECTOR4(unsigned, uint4)

namespace v3b::kern::emu {

struct ThreadIndex {
  dim3 thread, block, block_dim, grid_dim;
};
// Of the running fiber. constinit: without it every use goes through a wrapper that asks for an initialiser, which GCC 12
// with UBSan takes for a null pointer.
extern constinit thread_local ThreadIndex* self;

uint8_t* shared_memory();
void enqueue(dim3 grid, int threads, int64_t shared_bytes, std::function<void()> body);

void barrier();  // all threads of the block
int barrier_or(int p);
void warp_barrier(unsigned mask);  // the lanes named
// Deposits `bytes` (at most 32) of this lane, waits for the mask, and returns all lanes' slots [32][32 bytes]; release()
// must follow before the next exchange.
const uint8_t* exchange(unsigned mask, const void* value, int bytes);
void release(unsigned mask);

void cp_async(void* to, const void* from, int bytes);  // from null: zeros
void cp_async_commit();
void cp_async_wait(int pending);
void ldmatrix(uint32_t* r, int tiles, const void* row, bool transposed);
void mma_bf16(float* d, const uint32_t* a, uint32_t b0, uint32_t b1);
void mma_e4m3(float* d, const uint32_t* a, uint32_t b0, uint32_t b1);
[[noreturn]] void fail(const char* what);

template <class T>
T shuffle(unsigned mask, T v, int from) {
  static_assert(sizeof(T) <= 8);
  const uint8_t* slots = exchange(mask, &v, sizeof v);
  T r = v;
  if (from >= 0 && from < 32) {
    if ((mask >> from & 1u) == 0) fail("shuffle from a lane outside of the mask");
    std::memcpy(&r, slots + 32 * from, sizeof r);
  }
  release(mask);
  return r;
}
inline int lane() { return static_cast<int>(self->thread.x & 31u); }

}  // namespace v3b::kern::emu

#define threadIdx (::v3b::kern::emu::self->thread)
#define blockIdx (::v3b::kern::emu::self->block)
#define blockDim (::v3b::kern::emu::self->block_dim)
#define gridDim (::v3b::kern::emu::self->grid_dim)

inline void __syncthreads() { v3b::kern::emu::barrier(); }
inline void __syncwarp(unsigned mask = 0xffffffffu) { v3b::kern::emu::warp_barrier(mask); }
inline void __threadfence() {}
template <class T>
T __shfl_sync(unsigned mask, T v, int from, int width = 32) {
  return v3b::kern::emu::shuffle(mask, v,
                                 (v3b::kern::emu::lane() & ~(width - 1)) | (from & (width - 1)));
}
template <class T>
T __shfl_xor_sync(unsigned mask, T v, int x, int = 32) {
  return v3b::kern::emu::shuffle(mask, v, v3b::kern::emu::lane() ^ x);
}
template <class T>
T __shfl_down_sync(unsigned mask, T v, int n, int width = 32) {
  const int l = v3b::kern::emu::lane();
  return v3b::kern::emu::shuffle(mask, v, (l & (width - 1)) + n < width ? l + n : l);
}
template <class T>
T __shfl_up_sync(unsigned mask, T v, int n, int width = 32) {
  const int l = v3b::kern::emu::lane();
  return v3b::kern::emu::shuffle(mask, v, (l & (width - 1)) - n >= 0 ? l - n : l);
}
inline unsigned __ballot_sync(unsigned mask, bool p) {
  const int v = p;
  const uint8_t* slots = v3b::kern::emu::exchange(mask, &v, sizeof v);
  unsigned r = 0;
  for (int i = 0; i < 32; ++i) {
    int b = 0;
    if (mask >> i & 1u) std::memcpy(&b, slots + 32 * i, sizeof b);
    r |= static_cast<unsigned>(b) << i;
  }
  v3b::kern::emu::release(mask);
  return r;
}
inline bool __any_sync(unsigned mask, bool p) { return __ballot_sync(mask, p) != 0; }
inline bool __all_sync(unsigned mask, bool p) { return __ballot_sync(mask, p) == mask; }
inline int __syncthreads_or(int p) { return v3b::kern::emu::barrier_or(p); }

// One OS thread runs all blocks of a launch: read-modify-write needs no lock.
template <class T, class U>
T atomicAdd(T* p, U v) {
  const T old = *p;
  *p = static_cast<T>(old + static_cast<T>(v));
  return old;
}
template <class T, class U>
T atomicMax(T* p, U v) {
  const T old = *p;
  if (static_cast<T>(v) > old) *p = static_cast<T>(v);
  return old;
}
template <class T, class U>
T atomicExch(T* p, U v) {
  const T old = *p;
  *p = static_cast<T>(v);
  return old;
}
template <class T>
T __ldg(const T* p) {
  return *p;
}
inline float __uint_as_float(unsigned u) { return std::bit_cast<float>(u); }
inline unsigned __float_as_uint(float f) { return std::bit_cast<unsigned>(f); }
inline int __float_as_int(float f) { return std::bit_cast<int>(f); }
inline float __int_as_float(int i) { return std::bit_cast<float>(i); }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline float __fsqrt_rn(float a) { return std::sqrt(a); }
inline float __fdividef(float a, float b) { return a / b; }
inline float __expf(float x) { return std::exp(x); }
inline float __logf(float x) { return std::log(x); }
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
inline int __popc(unsigned x) { return std::popcount(x); }
inline int __ffs(int x) { return x == 0 ? 0 : std::countr_zero(static_cast<unsigned>(x)) + 1; }
inline int __clz(int x) { return std::countl_zero(static_cast<unsigned>(x)); }
template <class T>
T min(T a, T b) {
  return b < a ? b : a;
}
template <class T>
T max(T a, T b) {
  return a < b ? b : a;
}
