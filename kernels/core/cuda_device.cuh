// The vocabulary of our CUDA kernels: what nvcc gives, plus warp products, ldmatrix, cp.async and conversions under
// names that exist in the emulation too. A kernel file includes only this header and plain ones; it then compiles
// with nvcc for hardware and with the host's C++ compiler for the emulation (cuda_emulation.h).
//
// Rules that make both work: 1-D blocks; `__shared__` only through V3B_DYNAMIC_SHARED (a block's shared memory starts as
// NaN in the emulation); kernels are launched with launch(); every lane named in a mask reaches a warp collective; no
// inline PTX outside this header; no <<<>>>, no cooperative groups; no early return before a barrier.
#pragma once
#include <cstdint>
#include <type_traits>

#include "kernels/core/cuda.h"
#include "reference/spec/dtype.h"

#if defined(V3B_CUDA_EMULATE)
#include "kernels/core/cuda_emulation.h"
#else
#include <cuda_runtime.h>
#endif

namespace v3b::kern {

// Launch limits checked where they are known: throws v3b::Error on a bad configuration (real build: from the
// runtime's own error; emulation: more than 1024 threads, more than 227 KiB of shared memory, empty grid).
struct LaunchConfig {
  dim3 grid;
  int threads;
  int64_t shared_bytes = 0;
  CudaStream stream = nullptr;
};

#if defined(V3B_CUDA_EMULATE)

#define V3B_DYNAMIC_SHARED(name) uint8_t* name = ::v3b::kern::emu::shared_memory()

template <class... P, class... A>
void launch(void (*kernel)(P...), const LaunchConfig& c, A&&... args) {
  emu::enqueue(c.grid, c.threads, c.shared_bytes,
               [kernel, ... a = std::decay_t<P>(args)] { kernel(a...); });
}

#else

// Throws v3b::Error naming the failing call and the CUDA error.
void cuda_check(cudaError_t e, const char* what);
#define V3B_DYNAMIC_SHARED(name) extern __shared__ __align__(1024) uint8_t name[]

template <class... P, class... A>
void launch(void (*kernel)(P...), const LaunchConfig& c, A&&... args) {
  if (c.shared_bytes > 48 * 1024)
    cuda_check(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                    cudaFuncAttributeMaxDynamicSharedMemorySize,
                                    static_cast<int>(c.shared_bytes)),
               "shared memory of a kernel");
  cudaLaunchConfig_t lc = {};
  lc.gridDim = c.grid;
  lc.blockDim = dim3(static_cast<unsigned>(c.threads));
  lc.dynamicSmemBytes = static_cast<size_t>(c.shared_bytes);
  lc.stream = c.stream;
  cuda_check(cudaLaunchKernelEx(&lc, kernel, static_cast<P>(args)...), "kernel launch");
}

#endif

namespace dev {

using spec::bf16;
using spec::f8e4m3;

inline constexpr unsigned kFullMask = 0xffffffffu;
inline constexpr int kWarp = 32;

__device__ __forceinline__ int lane_id() { return static_cast<int>(threadIdx.x) & 31; }
__device__ __forceinline__ int warp_id() { return static_cast<int>(threadIdx.x) >> 5; }

// 2^x, full range, about 2 ulp (ex2.approx); exp2(-inf) = 0.
__device__ __forceinline__ float fast_exp2(float x) {
#if defined(__CUDA_ARCH__)
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return exp2f(x);
#endif
}

__device__ __forceinline__ float warp_sum(float v) {
#pragma unroll
  for (int o = 16; o > 0; o >>= 1) v += __shfl_xor_sync(kFullMask, v, o);
  return v;
}
__device__ __forceinline__ float warp_max(float v) {
#pragma unroll
  for (int o = 16; o > 0; o >>= 1) v = fmaxf(v, __shfl_xor_sync(kFullMask, v, o));
  return v;
}
// Over all threads of the block (a multiple of 32); scratch: 33 floats of shared memory, free again after the call.
// Every thread gets the result; the order of the sum is fixed.
__device__ __forceinline__ float block_sum(float v, float* scratch) {
  v = warp_sum(v);
  __syncthreads();
  if (lane_id() == 0) scratch[warp_id()] = v;
  __syncthreads();
  const int warps = static_cast<int>(blockDim.x) >> 5;
  if (warp_id() == 0) {
    const float s = warp_sum(lane_id() < warps ? scratch[lane_id()] : 0.0f);
    if (lane_id() == 0) scratch[32] = s;
  }
  __syncthreads();
  return scratch[32];
}
__device__ __forceinline__ float block_max(float v, float* scratch) {
  v = warp_max(v);
  __syncthreads();
  if (lane_id() == 0) scratch[warp_id()] = v;
  __syncthreads();
  const int warps = static_cast<int>(blockDim.x) >> 5;
  if (warp_id() == 0) {
    const float s = warp_max(lane_id() < warps ? scratch[lane_id()] : -INFINITY);
    if (lane_id() == 0) scratch[32] = s;
  }
  __syncthreads();
  return scratch[32];
}

// ---- conversions: RNE, the same bits as reference/spec/dtype.h -----------------------------------------------------
__device__ __forceinline__ uint32_t pack_bf16(float lo, float hi) {  // low half: lo
#if defined(__CUDA_ARCH__)
  uint32_t r;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(hi), "f"(lo));
  return r;
#else
  return spec::to_bf16(lo).bits | static_cast<uint32_t>(spec::to_bf16(hi).bits) << 16;
#endif
}
__device__ __forceinline__ bf16 round_bf16(float x) {
  return bf16{static_cast<uint16_t>(pack_bf16(x, 0.0f) & 0xffffu)};
}
__device__ __forceinline__ float bf16_lo(uint32_t two) { return __uint_as_float(two << 16); }
__device__ __forceinline__ float bf16_hi(uint32_t two) {
  return __uint_as_float(two & 0xffff0000u);
}
// Two E4M3 codes (low byte first), saturating to +-448.
__device__ __forceinline__ uint16_t pack_e4m3(float lo, float hi) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 890
  uint16_t r;
  asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(r) : "f"(hi), "f"(lo));
  return r;
#else
  return static_cast<uint16_t>(spec::to_f8e4m3(lo).bits | spec::to_f8e4m3(hi).bits << 8);
#endif
}
__device__ __forceinline__ float2 unpack_e4m3(uint16_t two) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 890
  uint32_t h;  // two halves, exact
  asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(h) : "h"(two));
  float lo, hi;
  asm("{.reg .b16 a, b; mov.b32 {a, b}, %2; cvt.f32.f16 %0, a; cvt.f32.f16 %1, b;}"
      : "=f"(lo), "=f"(hi)
      : "r"(h));
  return make_float2(lo, hi);
#else
  return make_float2(spec::to_float(f8e4m3{static_cast<uint8_t>(two & 0xff)}),
                     spec::to_float(f8e4m3{static_cast<uint8_t>(two >> 8)}));
#endif
}

// Element of a tensor whose type is known at run time only (never in an inner loop of a tensor-core kernel).
__device__ __forceinline__ float load_as_float(const void* p, int64_t i, spec::DType t) {
  switch (t) {
    case spec::DType::bf16:
      return spec::to_float(static_cast<const bf16*>(p)[i]);
    case spec::DType::f32:
      return static_cast<const float*>(p)[i];
    default:
      return spec::to_float(static_cast<const f8e4m3*>(p)[i]);
  }
}
__device__ __forceinline__ void store_from_float(void* p, int64_t i, spec::DType t, float v) {
  if (t == spec::DType::bf16)
    static_cast<bf16*>(p)[i] = round_bf16(v);
  else
    static_cast<float*>(p)[i] = v;
}
template <class T>
__device__ __forceinline__ float as_float(T v) {
  if constexpr (std::is_same_v<T, float>)
    return v;
  else
    return spec::to_float(v);
}
template <class T>
__device__ __forceinline__ T from_float(float v) {
  if constexpr (std::is_same_v<T, float>)
    return v;
  else
    return round_bf16(v);
}

// ---- shared memory in, tiles --------------------------------------------------------------------------------------
// 16 bytes global -> shared without registers; valid = false writes zeros (gmem is not read). Both 16-byte aligned.
__device__ __forceinline__ void cp_async16(void* smem, const void* gmem, bool valid = true) {
#if defined(__CUDA_ARCH__)
  const unsigned s = static_cast<unsigned>(__cvta_generic_to_shared(smem));
  const int n = valid ? 16 : 0;
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(s), "l"(gmem), "r"(n)
               : "memory");
#elif defined(V3B_CUDA_EMULATE)
  emu::cp_async(smem, valid ? gmem : nullptr, 16);
#endif
}
__device__ __forceinline__ void cp_async_commit() {
#if defined(__CUDA_ARCH__)
  asm volatile("cp.async.commit_group;" ::: "memory");
#elif defined(V3B_CUDA_EMULATE)
  emu::cp_async_commit();
#endif
}
// All but the latest N groups of this thread have arrived. Other threads' copies need a barrier on top.
template <int N>
__device__ __forceinline__ void cp_async_wait() {
#if defined(__CUDA_ARCH__)
  asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
#elif defined(V3B_CUDA_EMULATE)
  emu::cp_async_wait(N);
#endif
}

// Four 8x8 tiles of 16-bit elements: lane i gives the address of row i%8 of tile i/8 (16 bytes, aligned); register j
// gets of tile j: row lane/4, elements 2(lane%4) and +1. Transposed: elements [2(lane%4)][lane/4] and [2(lane%4)+1][..].
__device__ __forceinline__ void ldmatrix_x4(uint32_t (&r)[4], const void* row) {
#if defined(__CUDA_ARCH__)
  const unsigned s = static_cast<unsigned>(__cvta_generic_to_shared(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(s)
               : "memory");
#elif defined(V3B_CUDA_EMULATE)
  emu::ldmatrix(r, 4, row, false);
#endif
}
__device__ __forceinline__ void ldmatrix_x4_trans(uint32_t (&r)[4], const void* row) {
#if defined(__CUDA_ARCH__)
  const unsigned s = static_cast<unsigned>(__cvta_generic_to_shared(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(s)
               : "memory");
#elif defined(V3B_CUDA_EMULATE)
  emu::ldmatrix(r, 4, row, true);
#endif
}

// d[16,8] += a[16,16] b[16,8] in fp32. With g = lane/4, t = lane%4 (PTX ISA, m16n8k16):
// a: {(g, 2t), (g+8, 2t), (g, 2t+8), (g+8, 2t+8)}, two elements along k each; b: {(k=2t, n=g), (k=2t+8, n=g)};
// d: {(g, 2t), (g, 2t+1), (g+8, 2t), (g+8, 2t+1)}.
__device__ __forceinline__ void mma_bf16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0,
                                         uint32_t b1) {
#if defined(__CUDA_ARCH__)
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#elif defined(V3B_CUDA_EMULATE)
  emu::mma_bf16(d, a, b0, b1);
#endif
}
// d[16,8] += a[16,32] b[32,8], E4M3 operands (sm_89 and later; traps elsewhere: dispatch by capability). Layout as
// above with four 8-bit elements a register: a: (g, 4t), (g+8, 4t), (g, 4t+16), (g+8, 4t+16); b: (k=4t), (k=4t+16).
// Hopper's tensor cores keep about 14 bits of the running sum (SPEC 1.23): add into fp32 every 128 of k.
__device__ __forceinline__ void mma_e4m3(float (&d)[4], const uint32_t (&a)[4], uint32_t b0,
                                         uint32_t b1) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 890
  asm volatile(
      "mma.sync.aligned.m16n8k32.row.col.f32.e4m3.e4m3.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#elif defined(__CUDA_ARCH__)
  asm volatile("trap;");
#elif defined(V3B_CUDA_EMULATE)
  emu::mma_e4m3(d, a, b0, b1);
#endif
}

}  // namespace dev
}  // namespace v3b::kern
