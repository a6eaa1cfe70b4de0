// Bytes from global to global memory by one warp, in the largest units that both addresses and the size allow.
#pragma once
#include "kernels/core/cuda_device.cuh"

namespace v3b::kern::dev {

template <class Unit>
__device__ __forceinline__ void warp_copy_units(void* to, const void* from, int64_t bytes) {
  for (int64_t i = lane_id(); i < bytes / static_cast<int64_t>(sizeof(Unit)); i += 32)
    static_cast<Unit*>(to)[i] = static_cast<const Unit*>(from)[i];
}
// Any alignment.
__device__ __forceinline__ void warp_copy(void* to, const void* from, int64_t bytes) {
  const uint64_t all = reinterpret_cast<uintptr_t>(to) | reinterpret_cast<uintptr_t>(from) |
                       static_cast<uint64_t>(bytes);
  if (all % 16 == 0)
    warp_copy_units<uint4>(to, from, bytes);
  else if (all % 4 == 0)
    warp_copy_units<uint32_t>(to, from, bytes);
  else if (all % 2 == 0)
    warp_copy_units<uint16_t>(to, from, bytes);
  else
    warp_copy_units<uint8_t>(to, from, bytes);
}

}  // namespace v3b::kern::dev
