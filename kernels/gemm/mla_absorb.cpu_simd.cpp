#include "kernels/gemm/mla_absorb.h"

namespace v3b::kern {

void mla_absorb_cpu_simd(const spec::MlaAbsorbArgs& a) noexcept {
  const HeadProducts p = head_products(a);
  gemm_batched(p.g, p.count, p.stride_a, p.stride_b, p.stride_c);
}

}  // namespace v3b::kern
