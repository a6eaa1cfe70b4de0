// One thread's product of a strip of weight rows with packed activations: what gemm(), fp8_gemm() and the experts
// are made of. Internal to kernels.
//
//   form  = tile_form(x type, w type)                      f32, or pairs of bf16 (AVX512_BF16 and up)
//   packed: buffer of strip_x_dwords(form, m, k) uint32    once a call, shared by all threads
//   strip_pack_x(form, pack args with src, type, ld, index, count = m, k, out)   gathers rows through index
//   strip(x, w, n0, n1, c, ldc, add)                       any strip, any thread; c is [n1 - n0, ldc >= m]: transposed
//
// The result lies lanes (tokens) innermost, which is what k_major packing of the next product reads: SwiGLU runs over
// it as it is, and strip_pack_x with k_major, type f32 or bf16, packs [k, m] without a transpose.
#pragma once
#include "kernels/gemm/tile.h"

namespace v3b::kern {

struct StripX {
  TileForm form = TileForm::f32;
  int64_t m = 0, k = 0;
  const uint32_t* q = nullptr;
  int64_t q_group = 0;
  // Of FP8 activations: [blocks of 128][m rounded up to 16], null: all one. Only with an f8e4m3 weight.
  const float* scale = nullptr;
};
struct StripW {
  spec::DType type = spec::DType::bf16;
  const void* w = nullptr;
  int64_t ld = 0;                // elements from row to row ([N, ld]; k_major: [K, ld])
  bool k_major = false;          // not with f8e4m3
  const float* scale = nullptr;  // f8e4m3: [ceil(N/128), ceil(K/128)]; rows are counted from w
};

int64_t strip_x_dwords(TileForm form, int64_t m, int64_t k) noexcept;
// Groups of 16 rows [g0, g1) of x into out (the whole buffer's start); the groups can be shared out to threads.
void strip_pack_x(TileForm form, const PackArgs& x, int64_t g0, int64_t g1) noexcept;
StripX strip_x(TileForm form, int64_t m, int64_t k, const uint32_t* packed) noexcept;
// c[(n - n0) * ldc + i - 16 * g0] (+)= sum_k w[n][k] x[i][k] for the lanes 16 * g0 <= i < 16 * g1 of x, i < m. n0 a
// multiple of 128 or n0..n1 within one block of 128 rows where w is f8e4m3.
void strip_lanes(const StripX& x, int64_t g0, int64_t g1, const StripW& w, int64_t n0, int64_t n1,
                 float* c, int64_t ldc, bool add) noexcept;

// Few rows of activations as they lie (no packing), dot products along K: better than strips up to this many rows.
int64_t strip_few_rows(spec::DType x, spec::DType w) noexcept;

}  // namespace v3b::kern
