// Experts composed of library products: gather, gate and up, SwiGLU, down, weighted scatter, expert
// by expert. The baseline that a user would write; every expert's GEMM uses all threads, so few
// rows leave them idle.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "kernels/gemm/gemm.h"
#include "kernels/moe/moe.h"
#include "kernels/moe/moe_scratch.h"

namespace v3b::kern {
namespace {

// One term onto a running sum; moe_accum=bf16 rounds term, product and sum.
void add_row(const spec::MoeExpertsArgs& a, const float* o, float w, float* y) {
  if (a.moe_accum == spec::MoeAccum::fp32) {
    for (int64_t j = 0; j < a.d; ++j) y[j] += w * o[j];
    return;
  }
  const auto rounded = [](float v) { return spec::to_float(spec::to_bf16(v)); };
  for (int64_t j = 0; j < a.d; ++j) y[j] = rounded(y[j] + rounded(w * rounded(o[j])));
}

float silu(float a) { return a / (1.0f + std::exp(-a)); }

void ffn(const spec::MoeExpertsArgs& a, const spec::FfnPointers& w, int64_t rows, int64_t m,
         const void* x, MoeScratch::Impl& s, float* out) {
  s.gate.reserve_discard(rows * m);
  s.up.reserve_discard(rows * m);
  s.hidden.reserve_discard(rows * m * spec::dtype_bytes(a.x_dtype));
  GemmArgs g{.M = rows,
             .N = m,
             .K = a.d,
             .a = x,
             .lda = a.d,
             .b = w.gate,
             .ldb = a.d,
             .c = s.gate.data(),
             .ldc = m,
             .ab_type = a.x_dtype};
  gemm_onednn(g);
  g.b = w.up;
  g.c = s.up.data();
  gemm_onednn(g);
#pragma omp parallel for schedule(static) if (rows * m > 16384)
  for (int64_t i = 0; i < rows * m; ++i) {
    const float h = silu(s.gate[i]) * s.up[i];
    if (a.x_dtype == spec::DType::bf16)
      reinterpret_cast<spec::bf16*>(s.hidden.data())[i] = spec::to_bf16(h);
    else
      reinterpret_cast<float*>(s.hidden.data())[i] = h;
  }
  gemm_onednn({.M = rows,
               .N = a.d,
               .K = m,
               .a = s.hidden.data(),
               .lda = m,
               .b = w.down,
               .ldb = m,
               .c = out,
               .ldc = a.d,
               .ab_type = a.x_dtype});
}

}  // namespace

void moe_experts_cpu_onednn(const spec::MoeExpertsArgs& a, MoeScratch& scratch) noexcept {
  MoeScratch::Impl& s = *scratch.impl();
  const int64_t row_bytes = a.d * spec::dtype_bytes(a.x_dtype);
  s.plan(a.T, a.K, a.E, a.idx);
  s.sum.reserve_discard(a.T * a.d);
  std::fill(s.sum.data(), s.sum.data() + a.T * a.d, 0.0f);
  for (int64_t e = 0; e < a.E; ++e) {
    const int64_t first = s.offsets[e], rows = s.offsets[e + 1] - first;
    if (rows == 0) continue;
    s.gathered.reserve_discard(rows * row_bytes);
    s.out.reserve_discard(rows * a.d);
    for (int64_t i = 0; i < rows; ++i)
      std::memcpy(s.gathered.data() + i * row_bytes,
                  static_cast<const char*>(a.x) + s.slot[first + i] / a.K * row_bytes, row_bytes);
    ffn(a, a.experts[e], rows, a.m, s.gathered.data(), s, s.out.data());
    for (int64_t i = 0; i < rows; ++i) {
      const int64_t slot = s.slot[first + i];
      add_row(a, s.out.data() + i * a.d, a.weight[slot], s.sum.data() + slot / a.K * a.d);
    }
  }
  if (a.shared_m > 0) {
    s.out.reserve_discard(a.T * a.d);
    ffn(a, a.shared, a.T, a.shared_m, a.x, s, s.out.data());
    for (int64_t t = 0; t < a.T; ++t)
      add_row(a, s.out.data() + t * a.d, 1.0F, s.sum.data() + t * a.d);
  }
  if (a.x_dtype == spec::DType::bf16)
    convert_f32_to_bf16(s.sum.data(), static_cast<spec::bf16*>(a.y), a.T * a.d);
  else
    std::memcpy(a.y, s.sum.data(), static_cast<size_t>(a.T * a.d) * 4);
}

}  // namespace v3b::kern
