// One-thread matrix tiles that every dense CPU product is made of. Internal to kernels.
//
// C[r][l] = sum_k P[r][k] Q[l][k]: `rows` r are broadcast, `lanes` l fill the vector registers in groups of 16. For a
// weight W [N, K] and few activations X [M, K], P is W as it lies in memory and Q is X packed (C^T = W X^T): no
// second copy of a weight. Everything is in dwords: one float (TileForm::f32) or a pair of bf16 along K
// (TileForm::pairs, low half first); a step is one dword along K.
#pragma once
#include <cstdint>

#include "reference/spec/dtype.h"

namespace v3b::kern {

enum class TileForm : uint8_t { f32, pairs };
inline constexpr int64_t kTileLanes = 16;
inline constexpr int64_t kTileStepPad =
    16;  // packed operands end in zeros up to a multiple of this many steps

struct TileArgs {
  int64_t rows = 0, lanes = 0, steps = 0;
  const uint32_t* p =
      nullptr;  // step s of row r at p[r * p_row + s * p_step]; p_row or p_step is 1
  int64_t p_row = 0, p_step = 1;
  const uint32_t* q =
      nullptr;  // step s of lane l at q[l / 16 * q_group + s * 16 + l % 16], whole groups
  int64_t q_group = 0;
  float* c = nullptr;  // c[r * ldc + l]
  int64_t ldc = 0;
  bool add = false;  // to what c holds
  const float* scale =
      nullptr;  // [whole groups] the sum of lane l is multiplied by scale[l] before it is added
};

// Brings an operand into dwords, zeros beyond k and beyond `count`. Steps in all: tile_steps(form, k).
struct PackArgs {
  const void* src = nullptr;
  spec::DType type =
      spec::DType::bf16;  // bf16; f32 for TileForm::f32 only; f8e4m3 only with k_major false
  int64_t ld = 0;         // of src in elements: [count, k], or [k, count] with k_major
  bool k_major = false;
  const int32_t* index = nullptr;  // row i of src is row index[i] (not with k_major)
  int64_t count = 0, k = 0;
  uint32_t* out = nullptr;
  int64_t out_group = 0;  // lanes: as q_group above; rows: unused
  int64_t out_step = 16;  // lanes: dwords from step to step; rows: dwords from row to row
};
[[maybe_unused]] static int64_t tile_steps(TileForm form, int64_t k) {
  const int64_t steps = form == TileForm::pairs ? (k + 1) / 2 : k;
  return (steps + kTileStepPad - 1) / kTileStepPad * kTileStepPad;
}
// Dwords from group to group: no multiple of 4096 bytes, so that a panel's groups lie in different sets of L1.
[[maybe_unused]] static int64_t tile_group(TileForm form, int64_t k) {
  return tile_steps(form, k) * 16 + 16;
}

// The form that products of these types take at this level; f8e4m3 counts as exact in bf16.
TileForm tile_form(spec::DType a, spec::DType b) noexcept;
// Q: groups of 16 lanes. P: rows of tile_steps() dwords (k_major: [steps][out_step], as p_step = out_step wants it).
void tile_pack_lanes(TileForm form, const PackArgs& a) noexcept;
void tile_pack_rows(TileForm form, const PackArgs& a) noexcept;
void tile_run(TileForm form, const TileArgs& t) noexcept;  // at this level
bool tile_wants_rows() noexcept;  // the level's kernel takes p_step == 1 and whole padded steps only (AMX)

// Entry points of the files for one instruction set. AMX: p_step == 1, steps a multiple of 16.
void tile_f32_cpu_simd(const TileArgs& t) noexcept;    // Highway: AVX2, AVX-512
const char* tile_f32_isa() noexcept;                   // what it dispatches to
void tile_cpu_avx512bf16(const TileArgs& t) noexcept;  // pairs
void tile_cpu_amx(const TileArgs& t) noexcept;         // pairs
void tile_cpu_amx_emulated(const TileArgs& t) noexcept;
void tile_pack_lanes_f32_cpu_simd(const PackArgs& a) noexcept;
void tile_pack_rows_f32_cpu_simd(const PackArgs& a) noexcept;
void tile_pack_lanes_cpu_avx512bf16(const PackArgs& a) noexcept;  // f8e4m3 needs AVX512_VBMI too
void tile_pack_rows_cpu_avx512bf16(const PackArgs& a) noexcept;
void tile_widen_cpu_simd(const void* src, spec::DType type, int64_t n,
                         float* out) noexcept;  // to floats
// C [lanes, rows] (f32 or bf16) (+)= the transpose of c [rows, lanes].
struct StoreArgs {
  const float* from = nullptr;
  int64_t ld_from = 0, rows = 0, lanes = 0;
  void* c = nullptr;  // element (lane l, row r) at l * ldc + r
  int64_t ldc = 0;
  spec::DType type = spec::DType::f32;
  bool accumulate = false;
};
void tile_store_transposed(const StoreArgs& a) noexcept;
void tile_store_transposed_cpu_avx512(const StoreArgs& a) noexcept;

}  // namespace v3b::kern
