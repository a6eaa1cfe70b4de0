// gemm(): which way a product goes. Few rows stream the weights once (gemv.h), all others are
// oneDNN's; both on as many threads as the work is worth (kernels/core/team.h).
#include "kernels/gemm/gemm.h"

#include "kernels/core/team.h"
#include "kernels/gemm/gemv.h"

namespace v3b::kern {

void gemm_batched(const GemmArgs& g, int64_t count, int64_t stride_a, int64_t stride_b,
                  int64_t stride_c) noexcept {
  if (count == 1) {
    if (gemv_takes(g)) return gemv(g);
    stride_a = stride_b = stride_c = 0;
  }
  const double m = static_cast<double>(g.M), n = static_cast<double>(g.N),
               k = static_cast<double>(g.K), problems = static_cast<double>(count);
  const double bytes =
      problems * ((m * k + k * n) * static_cast<double>(spec::dtype_bytes(g.ab_type)) +
                  m * n * static_cast<double>(spec::dtype_bytes(g.c_type)));
  gemm_onednn_threads(g, count, stride_a, stride_b, stride_c,
                      team_for(bytes, 2 * m * n * k * problems), true);
}

void gemm(const GemmArgs& g) noexcept { gemm_batched(g, 1, 0, 0, 0); }

}  // namespace v3b::kern
