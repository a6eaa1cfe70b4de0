// One-thread products of the expert kernels for few rows: dot products with a block of weight rows as
// they lie, for every pair of input and weight type. Internal to kernels/moe.
#pragma once
#include <cstdint>

#include "kernels/moe/moe.h"

namespace v3b::kern {

// How x meets the weights.
//   same:  both f32 or both bf16.
//   fp8:   bf16 rows, padded with zeros to a multiple of 128, against FP8 codes widened in
//   registers (AVX512_BF16). widen: everything else; weight rows are widened to f32 a few at a
//   time, rows are f32.
enum class MoePath : uint8_t { same, fp8, widen };
MoePath moe_path(spec::DType x, spec::DType w) noexcept;

struct MoeProduct {
  MoePath path = MoePath::same;
  spec::DType x_dtype, w_dtype;    // of the op
  const float* ones = nullptr;     // fp8: [16 * blocks of the longest K] ones
  spec::DType row_dtype() const {  // of the input rows and the hidden rows in memory
    return path == MoePath::same  ? x_dtype
           : path == MoePath::fp8 ? spec::DType::bf16
                                  : spec::DType::f32;
  }
  int64_t row_stride(int64_t k) const { return path == MoePath::fp8 ? (k + 127) / 128 * 128 : k; }
  int64_t scratch_bytes(int64_t max_k) const;
  int64_t few_rows() const;  // up to here this is faster than strips (gemm/strip.h)
  // Whether so many rows lie packed: [k / 32 rounded up][rows][32], zeros past k (gemm/gemv.h).
  bool packs(int64_t rows) const;
  // c [rows, n1-n0] = a [rows, row_stride(k)] (or packed) * w[n0..n1, k]^T, one thread. rows <= few_rows();
  // FP8: [n0, n1) lies in one block of 128. scratch: 64-byte aligned, of this thread.
  void run(int64_t rows, int64_t k, const void* a, const void* w, const float* scale, int64_t n0,
           int64_t n1, float* c, void* scratch) const noexcept;
};

}  // namespace v3b::kern
