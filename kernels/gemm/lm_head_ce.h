// Output head with cross-entropy, never holding [T, V] logits (SPEC 1.29): products of all rows with
// a strip of the vocabulary, each folded at once into a running maximum, a running sum of
// exponentials and the argmax.
#pragma once
#include <cstdint>
#include <string>

#include "reference/spec/lm_head_ce.h"

namespace v3b::kern {

// NaN logits make lse and nll NaN.
void lm_head_ce_cpu_simd(const spec::LmHeadCeArgs& a) noexcept;
std::string lm_head_ce_cpu_simd_isa(spec::DType dtype);
// Baseline: logits [T, V] of the caller's, by oneDNN, then cross_entropy_rows.
void lm_head_ce_cpu_onednn(const spec::LmHeadCeArgs& a, float* logits) noexcept;

// The folding part alone, for callers that have logits: z [T, V] with row stride ldz, fp32. nll,
// argmax and labels as in LmHeadCeArgs. Uses all OpenMP threads.
void cross_entropy_rows(int64_t T, int64_t V, const float* z, int64_t ldz, const int64_t* labels,
                        float* nll, float* lse, int32_t* argmax) noexcept;
// dz [T, V] = (exp(z - lse) - onehot(label)) * scale, 0 where the label is -100; dz may be z
// itself. dz_bf16, if not null, receives the same rounded to bf16 [T, V] dense (then dz may be
// null).
void cross_entropy_backward_rows(int64_t T, int64_t V, const float* z, int64_t ldz,
                                 const int64_t* labels, const float* lse, float scale, float* dz,
                                 int64_t lddz, spec::bf16* dz_bf16) noexcept;

}  // namespace v3b::kern
