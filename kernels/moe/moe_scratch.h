// Scratch and dispatch plan shared by the expert kernels. Internal to kernels/moe.
#pragma once
#include <cstddef>
#include <cstdint>
#include <vector>

#include "kernels/moe/moe.h"

namespace v3b::kern {

struct MoeScratch::Impl {
  std::vector<int64_t> offsets, next, slot;   // [E+1], [E], [rows]: rows sorted by expert, stable in t*K+k
  std::vector<std::byte> gathered, hidden;    // gathered x rows; SwiGLU result, both in x's dtype
  std::vector<float> gate, up, out, sum;

  void plan(int64_t T, int64_t K, int64_t E, const int32_t* idx);
};

}  // namespace v3b::kern
