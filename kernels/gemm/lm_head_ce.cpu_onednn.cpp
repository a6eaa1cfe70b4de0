// Baseline of lm_head_ce: all logits by oneDNN into memory, then cross-entropy over their rows.
#include "kernels/gemm/lm_head_ce.h"

#include "kernels/gemm/gemm.h"

namespace v3b::kern {

void lm_head_ce_cpu_onednn(const spec::LmHeadCeArgs& a, float* logits) noexcept {
  GemmArgs g;
  g.M = a.T, g.N = a.V, g.K = a.d;
  g.a = a.h, g.lda = a.d;
  g.b = a.w, g.ldb = a.d;
  g.c = logits, g.ldc = a.V;
  g.ab_type = a.dtype;
  gemm_onednn(g);
  cross_entropy_rows(a.T, a.V, logits, a.V, a.labels, a.nll, a.lse, a.argmax);
}

}  // namespace v3b::kern
