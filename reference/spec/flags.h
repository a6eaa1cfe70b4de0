// Named choices where published code disagrees (SPEC Appendix B). The first value is the default.
// Every benchmark row records the flags that its op reads.
#pragma once
#include <cstdint>

namespace v3b::spec {
enum class RopeLayout : uint8_t { interleaved, hf_halfsplit };
enum class YarnWhen : uint8_t { always, only_if_ctx_gt_orig };
enum class YarnRamp : uint8_t { index, paper };
enum class NormRounding : uint8_t { single, hf };
enum class RouterMask : uint8_t { neg_inf, zero };
enum class RouterDtype : uint8_t { fp32, bf16 };
enum class GateEps : uint8_t { eps_1e20, zero };  // 1e-20 | 0
enum class MoeAccum : uint8_t { fp32, bf16 };
enum class KvFormat : uint8_t { bf16, fp8_656_pow2, fp8_656_free };
enum class ActScale : uint8_t { fp32, ue8m0 };
enum class MtpHidden : uint8_t { post_norm, pre_norm };
enum class MtpConcat : uint8_t { emb_h, h_emb };
enum class BalanceF : uint8_t { scores, routing };
enum class DropPolicy : uint8_t { slot, token, prob };
enum class PplDef : uint8_t { token_mean, window_mean };
enum class EmptyLse : uint8_t { pos_inf, neg_inf };

struct Flags {
  RopeLayout rope_layout = RopeLayout::interleaved;
  YarnWhen yarn_when = YarnWhen::always;
  YarnRamp yarn_ramp = YarnRamp::index;
  NormRounding norm_rounding = NormRounding::single;
  RouterMask router_mask = RouterMask::neg_inf;
  RouterDtype router_dtype = RouterDtype::fp32;
  GateEps gate_eps = GateEps::eps_1e20;
  MoeAccum moe_accum = MoeAccum::fp32;
  KvFormat kv_format = KvFormat::bf16;
  ActScale act_scale = ActScale::fp32;
  MtpHidden mtp_hidden = MtpHidden::post_norm;
  MtpConcat mtp_concat = MtpConcat::emb_h;
  bool mtp_zero_pos0 = false;
  BalanceF balance_f = BalanceF::scores;
  DropPolicy drop_policy = DropPolicy::slot;
  PplDef ppl = PplDef::token_mean;
  EmptyLse empty_lse = EmptyLse::pos_inf;
  // Experiment knobs of the expert-load scenario, off in every published comparison.
  bool ignore_selection_bias = false;  // select by s instead of s + b
  bool ignore_group_limit = false;     // select among all groups
};
}  // namespace v3b::spec
