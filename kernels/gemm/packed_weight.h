// Weights packed once at load, and the one-thread product that reads them: what the inference products (gemm, fp8_gemm,
// experts, head, absorbed projections) are made of. Internal to kernels.
//
// A packed weight [N, K] lies in groups of 16 outputs, K innermost in dwords of one pair of bf16 (low half first), of
// one float, or, FP8, in lines of four codes an output: one linear stream a group, each line loaded once and used for every row of
// activations (broadcast). So there is no sum across lanes, no transpose of the result, and a batch
// of up to eight rows reads a weight at the memory's speed. The layout is the same at every level.
#pragma once
#include <cstdint>

#include "reference/spec/dtype.h"

namespace v3b::kern {

struct PackedWeight {                    // a view; the memory is the caller's
  spec::DType type = spec::DType::bf16;  // bf16, f8e4m3, f32
  int64_t n = 0, k = 0;
  const void* data = nullptr;    // 64-byte aligned
  const float* scale = nullptr;  // f8e4m3: [ceil(N/128)][ceil(K/128)], not packed; null: all one
};

// K rounded up to whole steps: zeros beyond K.
[[maybe_unused]] static int64_t packed_depth(spec::DType type, int64_t k) {
  const int64_t unit = type == spec::DType::f32 ? 16 : 32;
  return (k + unit - 1) / unit * unit;
}
[[maybe_unused]] static int64_t packed_groups(int64_t n) { return (n + 15) / 16; }
// From group to group.
[[maybe_unused]] static int64_t packed_group_bytes(spec::DType type, int64_t k) {
  return packed_depth(type, k) * 16 * spec::dtype_bytes(type);
}
// FP8: the codes' bits lie as fp8_packed_avx512-inl.h wants them, and behind all groups lies a mark for each block of 128
// of K of each group: 1 where it holds a zero, a subnormal or a NaN.
inline constexpr float kPackedCodeScale = 256.0F;  // what the AVX-512 forms of the codes lack
[[maybe_unused]] static const uint8_t* packed_code_marks(const PackedWeight& w, int64_t group) {
  return static_cast<const uint8_t*>(w.data) +
         packed_groups(w.n) * packed_group_bytes(w.type, w.k) + group * ((w.k + 127) / 128);
}
// The weight's scale of a group and a block of 128 of K.
[[maybe_unused]] static float packed_scale(const PackedWeight& w, int64_t group, int64_t block) {
  return w.scale == nullptr ? 1.0F : w.scale[group / 8 * ((w.k + 127) / 128) + block];
}
// A multiple of 64.
[[maybe_unused]] static int64_t packed_weight_bytes(spec::DType type, int64_t n, int64_t k) {
  const int64_t marks = type == spec::DType::f8e4m3 ? packed_groups(n) * ((k + 127) / 128) : 0;
  return packed_groups(n) * packed_group_bytes(type, k) + (marks + 63) / 64 * 64;
}
// Groups [g0, g1) of w [N, ld] (k_major: [K, ld], bf16 and f32 only) into out (start of the whole buffer); any thread:
// let the one that will read them do it (first touch). Outputs beyond N and steps beyond K are zeros.
struct PackSource {
  spec::DType type = spec::DType::bf16;
  const void* w = nullptr;
  int64_t ld = 0;
  bool k_major = false;
  int64_t n = 0, k = 0;
};
void pack_weight(const PackSource& s, void* out, int64_t g0, int64_t g1) noexcept;

// Activations in the order in which the product broadcasts them: floats below AVX512_BF16 and against f32 weights, else
// pairs of bf16. Packed and used at one level, for one type of weight.
struct PackedRows {  // a view
  int64_t m = 0, k = 0;
  const uint32_t* data = nullptr;
  // Of FP8 activations: [m][scale_ld], a scale a block of 128; null: all one. With an f8e4m3 weight only.
  const float* scale = nullptr;
  int64_t scale_ld = 0;
};
int64_t packed_rows_dwords(spec::DType w, int64_t m, int64_t k) noexcept;  // at this level
struct RowsSource {
  // bf16, f8e4m3, f32 (rounded to bf16 where the product is in bf16)
  spec::DType type = spec::DType::bf16;
  const void* x = nullptr;
  int64_t ld = 0;
  const int32_t* index = nullptr;  // row i is x[index[i]]
  int64_t m = 0, k = 0;
};
// Rows [r0, r1) into out (start of the whole buffer); r0 a multiple of packed_rows_chunk(), r1 too or m.
int64_t packed_rows_chunk() noexcept;
void pack_rows(spec::DType w, const RowsSource& s, uint32_t* out, int64_t r0, int64_t r1) noexcept;

// c[i * ldc + n - 16 * g0] (+)= sum_k w[n][k] x[i][k] for the outputs n of groups [g0, g1) and all rows of x; one
// thread. Whole groups are written: ldc >= 16 * (g1 - g0), outputs beyond N get zeros (plus what was there).
void packed_product(const PackedWeight& w, const PackedRows& x, int64_t g0, int64_t g1, float* c,
                    int64_t ldc, bool add) noexcept;
// What the product is made of at this level.
const char* packed_isa(spec::DType x, spec::DType w) noexcept;

// Of one level each; x in its own order. Floats: [ceil(m / 8)] chunks of [depth][rows of the chunk].
void packed_product_cpu_simd(const PackedWeight& w, const PackedRows& x, int64_t g0, int64_t g1,
                             float* c, int64_t ldc, bool add) noexcept;
const char* packed_product_simd_isa() noexcept;
// Pairs: [ceil(m / 8)] chunks of [depth / 2][rows of the chunk].
void packed_product_cpu_avx512bf16(const PackedWeight& w, const PackedRows& x, int64_t g0,
                                   int64_t g1, float* c, int64_t ldc, bool add) noexcept;
// Pairs: [ceil(m / 16)] chunks of [depth / 32][rows of the chunk][16].
void packed_product_cpu_amx(const PackedWeight& w, const PackedRows& x, int64_t g0, int64_t g1,
                            float* c, int64_t ldc, bool add) noexcept;
void packed_product_cpu_amx_emulated(const PackedWeight& w, const PackedRows& x, int64_t g0,
                                     int64_t g1, float* c, int64_t ldc, bool add) noexcept;
// Pairs in the order of AVX512_BF16, or of AMX.
void packed_rows_cpu_avx512bf16(const RowsSource& s, bool for_amx, uint32_t* out, int64_t r0,
                                int64_t r1) noexcept;
void packed_codes_cpu_avx512bf16(const PackSource& s, uint8_t* out, uint8_t* marks, int64_t g0,
                                 int64_t g1) noexcept;

}  // namespace v3b::kern
