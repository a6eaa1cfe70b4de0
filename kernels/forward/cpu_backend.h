// The CPU backend (SPEC 1.32): weights packed once, paged latent cache, expanded MLA for prefill
// and absorbed MLA for decode, grouped experts, MTP module. Residual stream, router and softmax in
// f32; GEMM inputs in `compute`.
#pragma once
#include <memory>

#include "model/backend.h"

namespace v3b::kern {

// compute: bf16 ("cpu_bf16") or f32 ("cpu_f32"). Throws v3b::Error on what the kernels cannot do.
//
// Cost of a decode step of b sequences: every dense weight once, the experts that the b tokens
// choose once, and the cache rows of each sequence. Memory: packed weights, 2 (or 4) bytes each,
// W_UK twice (plain and transposed).
//
// Dynamic scalings of RoPE (dynamic NTK, dynamic YaRN): keys are cached rotated, so a call that
// changes the frequencies of a non-empty sequence throws; run such a sequence in one call
// (SPEC 1.4.3). One MTP module (model/mtp_support.h); more throw in mtp_forward.
std::unique_ptr<model::Backend> make_cpu_backend(model::WeightsPtr weights, spec::DType compute,
                                                 const model::BackendOptions& options = {});

}  // namespace v3b::kern
