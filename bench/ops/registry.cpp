#include "bench/ops/registry.h"

namespace v3b::bench {

// One factory an op, defined in bench/ops/<op>.cpp.
std::unique_ptr<OpBase> make_rmsnorm_op();
std::unique_ptr<OpBase> make_rope_op();
std::unique_ptr<OpBase> make_swiglu_op();
std::unique_ptr<OpBase> make_softmax_op();
std::unique_ptr<OpBase> make_embedding_op();
std::unique_ptr<OpBase> make_attention_prefill_op();
std::unique_ptr<OpBase> make_attention_decode_op();
std::unique_ptr<OpBase> make_mla_prefill_op();
std::unique_ptr<OpBase> make_mla_decode_op();
std::unique_ptr<OpBase> make_mla_cache_write_op();
std::unique_ptr<OpBase> make_mla_absorb_op();
std::unique_ptr<OpBase> make_gemm_op();
std::unique_ptr<OpBase> make_fp8_quant_op();
std::unique_ptr<OpBase> make_fp8_gemm_op();
std::unique_ptr<OpBase> make_lm_head_ce_op();
std::unique_ptr<OpBase> make_topk_backward_op();
std::unique_ptr<OpBase> make_forward_prefill_op();
std::unique_ptr<OpBase> make_forward_decode_op();
std::unique_ptr<OpBase> make_mtp_module_op();
std::unique_ptr<OpBase> make_mtp_accept_op();
std::unique_ptr<OpBase> make_router_op();
std::unique_ptr<OpBase> make_moe_dispatch_op();
std::unique_ptr<OpBase> make_moe_combine_op();
std::unique_ptr<OpBase> make_moe_experts_op();

std::vector<std::unique_ptr<OpBase>> all_ops() {
  std::vector<std::unique_ptr<OpBase>> ops;
  ops.push_back(make_rmsnorm_op());
  ops.push_back(make_rope_op());
  ops.push_back(make_swiglu_op());
  ops.push_back(make_softmax_op());
  ops.push_back(make_embedding_op());
  ops.push_back(make_attention_prefill_op());
  ops.push_back(make_attention_decode_op());
  ops.push_back(make_mla_prefill_op());
  ops.push_back(make_mla_decode_op());
  ops.push_back(make_mla_cache_write_op());
  ops.push_back(make_mla_absorb_op());
  ops.push_back(make_gemm_op());
  ops.push_back(make_fp8_quant_op());
  ops.push_back(make_fp8_gemm_op());
  ops.push_back(make_lm_head_ce_op());
  ops.push_back(make_topk_backward_op());
  ops.push_back(make_forward_prefill_op());
  ops.push_back(make_forward_decode_op());
  ops.push_back(make_mtp_module_op());
  ops.push_back(make_mtp_accept_op());
  ops.push_back(make_router_op());
  ops.push_back(make_moe_dispatch_op());
  ops.push_back(make_moe_combine_op());
  ops.push_back(make_moe_experts_op());
  return ops;
}

}  // namespace v3b::bench
