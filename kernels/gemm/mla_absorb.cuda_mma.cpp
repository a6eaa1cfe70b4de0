// The batched tensor-core product of gemm.cuda_mma.cu over heads.
#include "kernels/gemm/mla_absorb.h"

#include "kernels/gemm/gemm_cuda.h"

namespace v3b::kern {

void mla_absorb_cuda_mma(const spec::MlaAbsorbArgs& a, CudaStream stream) {
  const HeadProducts p = head_products(a);
  gemm_batched_cuda_mma(p.g, p.count, p.stride_a, p.stride_b, p.stride_c, stream);
}

}  // namespace v3b::kern
