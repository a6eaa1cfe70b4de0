// MHA, GQA and MQA prefill on tensor cores: how its arguments read as keys of flash_prefill.
#include "kernels/attention/attention_cuda.h"
#include "kernels/attention/flash_prefill.h"

namespace v3b::kern {

bool attention_prefill_cuda_mma_takes(int64_t d_qk, int64_t d_v) {
  return d_qk <= kFlashMost && d_v <= kFlashMost;
}

void attention_prefill_cuda_mma(const spec::AttentionArgs& a, CudaStream stream) {
  using spec::bf16;
  flash_prefill({.T = a.T,
                 .s0 = a.s0,
                 .n_h = a.n_h,
                 .group = a.n_h / a.n_kv,
                 .d1 = a.d_qk,
                 .d2 = 0,
                 .d_v = a.d_v,
                 .scale = a.scale,
                 .empty_lse = a.empty_lse,
                 .q = static_cast<const bf16*>(a.q),
                 .k1 = static_cast<const bf16*>(a.k),
                 .k2 = nullptr,
                 .v = static_cast<const bf16*>(a.v),
                 .q_row = a.q_stride,
                 .k1_row = a.k_stride,
                 .k1_head = a.d_qk,
                 .k2_row = 0,
                 .v_row = a.v_stride,
                 .v_head = a.d_v,
                 .o_row = a.o_stride,
                 .o = static_cast<bf16*>(a.o),
                 .lse = a.lse},
                stream);
}

}  // namespace v3b::kern
