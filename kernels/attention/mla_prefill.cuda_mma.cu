// Expanded MLA prefill on tensor cores: how its arguments read as keys of flash_prefill.
#include "kernels/attention/attention_cuda.h"
#include "kernels/attention/flash_prefill.h"

namespace v3b::kern {

void mla_prefill_cuda_mma(const spec::MlaPrefillArgs& a, CudaStream stream) {
  using spec::bf16;
  const bf16* kv = static_cast<const bf16*>(a.kv);
  flash_prefill({.T = a.T,
                 .s0 = a.s0,
                 .n_h = a.n_h,
                 .group = 1,
                 .d1 = a.d_n,
                 .d2 = a.d_r,
                 .d_v = a.d_v,
                 .scale = a.scale,
                 .empty_lse = spec::EmptyLse::pos_inf,
                 .q = static_cast<const bf16*>(a.q),
                 .k1 = kv,
                 .k2 = static_cast<const bf16*>(a.k_pe),
                 .v = kv + a.d_n,
                 .q_row = a.q_stride,
                 .k1_row = a.kv_stride,
                 .k1_head = a.d_n + a.d_v,
                 .k2_row = a.k_pe_stride,
                 .v_row = a.kv_stride,
                 .v_head = a.d_n + a.d_v,
                 .o_row = a.o_stride,
                 .o = static_cast<bf16*>(a.o),
                 .lse = a.lse},
                stream);
}

}  // namespace v3b::kern
