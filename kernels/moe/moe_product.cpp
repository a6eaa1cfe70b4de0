#include "kernels/moe/moe_product.h"

#include <algorithm>

#include "kernels/core/cpu.h"
#include "kernels/gemm/fp8.h"
#include "kernels/gemm/fp8_dots.h"
#include "kernels/gemm/gemm.h"
#include "kernels/gemm/gemv.h"

namespace v3b::kern {
namespace {
using spec::DType;
constexpr int64_t kWidenRows = 16;  // weight rows widened at a time
// Measured (kernels/notes/moe.md): strips pay for 16 rows whatever there are; FP8 codes are widened
// once for six rows here and once for all there.
constexpr int64_t kFewDot = 12, kFewFp8 = 8, kFewWide = 4;

const uint8_t* at(const void* p, int64_t elements, DType t) {
  return static_cast<const uint8_t*>(p) + elements * spec::dtype_bytes(t);
}
bool dots(const MoeProduct& p) {
  return p.path == MoePath::same && p.x_dtype == DType::bf16 && cpu_features().avx512_bf16;
}
int64_t blocks_of(int64_t k) { return (k + 127) / 128; }
}  // namespace

MoePath moe_path(DType x, DType w) noexcept {
  if (x == w) return MoePath::same;
  if (x == DType::bf16 && w == DType::f8e4m3 && fp8_gemm_avx512bf16_supported())
    return MoePath::fp8;
  return MoePath::widen;
}

int64_t MoeProduct::scratch_bytes(int64_t max_k) const {
  if (path == MoePath::fp8)  // two rows in the dot kernel's order, their scales
    return kFp8DotsRows * blocks_of(max_k) * (128 * 2 + 4) + 64;
  return path == MoePath::widen ? (kWidenRows * max_k * 4 + 63) / 64 * 64 : 0;
}

int64_t MoeProduct::few_rows() const {
  if (path == MoePath::fp8) return kFewFp8;
  // With AMX the tiles take over where the products start to bind.
  return dots(*this) && !cpu_features().amx_bf16 ? kFewDot : kFewWide;
}
bool MoeProduct::packs(int64_t rows) const { return rows > 0 && dots(*this); }

void MoeProduct::run(int64_t rows, int64_t k, const void* a, const void* w, const float* scale,
                     int64_t n0, int64_t n1, float* c, void* scratch) const noexcept {
  const int64_t n = n1 - n0, blocks = blocks_of(k);
  const uint8_t* b = at(w, n0 * k, w_dtype);
  const float* s = scale == nullptr ? nullptr : scale + n0 / 128 * blocks;
  GemmArgs g{.M = rows,
             .N = n,
             .K = k,
             .a = a,
             .lda = k,
             .b = b,
             .ldb = k,
             .c = c,
             .ldc = n,
             .ab_type = x_dtype};
  if (packs(rows)) return gemv_packed_avx512bf16(g, static_cast<const spec::bf16*>(a), 0, n);
  if (path == MoePath::same) return gemm(g);
  if (path == MoePath::fp8 && rows <= kFp8DotsRows) {
    auto* ordered = static_cast<spec::bf16*>(scratch);
    const int64_t kp = blocks * 128;
    fp8_dots_order_cpu_avx512bf16(static_cast<const spec::bf16*>(a), kp, rows, k, kp, ordered);
    const Fp8Dots f{.m = rows,
                    .k = k,
                    .kp = kp,
                    .a = ordered,
                    .w = static_cast<const spec::f8e4m3*>(w),
                    .sw = scale,
                    .c = c,
                    .ldc = n,
                    .n_base = n0,
                    .scratch = reinterpret_cast<float*>(ordered + kFp8DotsRows * kp)};
    return fp8_dots_cpu_avx512bf16(f, n0, n1);
  }
  if (path == MoePath::fp8) {
    const spec::Fp8GemmArgs f{
        rows, n, k, nullptr, ones, reinterpret_cast<const spec::f8e4m3*>(b), s, DType::f32, c};
    const auto* rows_bf16 = static_cast<const spec::bf16*>(a);
    return fp8_gemv_avx512bf16(f, rows_bf16, blocks * 128, 0, n);
  }
  auto* wide = static_cast<float*>(scratch);
  g.ab_type = DType::f32;
  g.b = wide;
  for (int64_t j = 0; j < n; j += kWidenRows) {
    g.N = std::min(kWidenRows, n - j);
    g.c = c + j;
    const uint8_t* from = at(b, j * k, w_dtype);
    if (w_dtype == DType::f8e4m3)
      fp8_dequant_weight(g.N, k, reinterpret_cast<const spec::f8e4m3*>(from), s, DType::f32, wide);
    else if (w_dtype == DType::bf16)
      convert_bf16_to_f32(reinterpret_cast<const spec::bf16*>(from), wide, g.N * k);
    else
      g.b = from;  // f32 weights, bf16 x
    gemm(g);
  }
}

}  // namespace v3b::kern
