// Baseline of fp8_gemm: oneDNN 3.2 has no FP8, so the weights were widened to fp32 beforehand (4
// bytes instead of 1) and the activations are in the call.
#include "kernels/gemm/fp8.h"
#include "kernels/gemm/gemm.h"

namespace v3b::kern {

void fp8_gemm_cpu_onednn(const spec::Fp8GemmArgs& a, const float* wide_b, float* wide_a) noexcept {
  const int64_t blocks = spec::fp8_blocks(a.k);
  for (int64_t i = 0; i < a.m; ++i)
    for (int64_t j = 0; j < a.k; ++j)
      wide_a[i * a.k + j] =
          spec::to_float(a.qa[i * a.k + j]) * a.sa[i * blocks + j / spec::kFp8Block];
  GemmArgs g;
  g.M = a.m, g.N = a.n, g.K = a.k;
  g.a = wide_a, g.lda = a.k;
  g.b = wide_b, g.ldb = a.k;
  g.c = a.c, g.ldc = a.n;
  g.ab_type = spec::DType::f32, g.c_type = a.c_type;
  gemm_onednn(g);
}

}  // namespace v3b::kern
