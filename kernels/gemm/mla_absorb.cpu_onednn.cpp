#include "kernels/gemm/mla_absorb.h"

#include <omp.h>

namespace v3b::kern {

void mla_absorb_cpu_onednn(const spec::MlaAbsorbArgs& a) noexcept {
  const HeadProducts p = head_products(a);
  gemm_onednn_threads(p.g, p.count, p.stride_a, p.stride_b, p.stride_c, omp_get_max_threads(),
                      false);
}

}  // namespace v3b::kern
