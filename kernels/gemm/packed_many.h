// More than 16 rows on a packed bf16 weight, straight into C: one level's form of packed_linear_part(). Internal to kernels.
#pragma once
#include "kernels/gemm/gemm.h"
#include "kernels/gemm/packed_weight.h"

namespace v3b::kern {

struct PackedMany {
  const uint32_t* w = nullptr;  // the whole packed weight, bf16
  uint32_t* x =
      nullptr;  // rows packed in pairs, from the first one on (packed_weight.h, AVX512_BF16's order)
  const RowsSource* source = nullptr;  // the same rows (no index) where x is yet to be packed
  bool keep = true;             // x: all of it; else a block of 8 rows, packed, used and forgotten
  int64_t m = 0, k = 0, n = 0;  // n: outputs of the weight
  int64_t g0 = 0, g1 = 0;       // groups to compute
  void* c = nullptr;            // row 0, output 0; nothing beyond n is written
  int64_t ldc = 0;
  spec::DType type = spec::DType::f32;
  bool add = false;       // to what c holds; f32 only
  float* sums = nullptr;  // packed_many_sums() floats
};
[[maybe_unused]] static int64_t packed_many_sums(int64_t m, int64_t groups) {
  return (m + 7) / 8 * 8 * groups * 16;
}
bool packed_many_takes(const PackedWeight& w, int64_t m) noexcept;  // at this level
void packed_many_cpu_avx512bf16(const PackedMany& p) noexcept;
int64_t packed_panels(int64_t k, int64_t groups) noexcept;  // that many calls for all groups
// Rows of x [k, ld] (k-major) into out, in the same order: m columns from src on.
void packed_columns_cpu_avx512bf16(const uint16_t* src, int64_t ld, int64_t m, int64_t k,
                                   uint32_t* out) noexcept;
// Steps [s0, s1) of all outputs of a k-major bf16 weight: pack_weight() by rows of K, as they lie.
void packed_weight_columns_cpu_avx512bf16(const PackSource& w, uint32_t* out, int64_t s0,
                                          int64_t s1) noexcept;
// gemm() through the same tiles, both operands packed in the call; false: not for this problem or level.
bool gemm_many(const GemmArgs& g, int threads) noexcept;
void packed_narrow_cpu_avx512(const float* from, void* to,
                              int64_t n) noexcept;  // bf16, to nearest even

}  // namespace v3b::kern
