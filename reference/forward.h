// The whole forward pass in plain Eigen (SPEC 1.32, 1.25), as a model::Backend. One implementation
// for float and double: reference_f32 and reference_f64. What every other backend is compared with.
#pragma once
#include <memory>

#include "model/backend.h"

namespace v3b::ref {

// Keys are cached before RoPE and rotated with the table of the current length at every call, so
// that dynamic NTK works (SPEC 1.4.3). Calls on an empty sequence use the expanded form (or the
// absorbed one with options.absorbed_prefill), later calls the absorbed form. kv_format != bf16
// sends every cache row through its record. With kv_format bf16 nothing is rounded.
// norm_rounding=hf and moe_accum=bf16 round to bf16, whatever S is. Throws
// v3b::Error on token ids out of range, contexts beyond options.max_context, mtp_forward without
// MTP or with several MTP modules (model/mtp_support.h).
template <class S>
std::unique_ptr<model::Backend> make_reference_backend(model::WeightsPtr weights,
                                                       const model::BackendOptions& options = {});

}  // namespace v3b::ref
