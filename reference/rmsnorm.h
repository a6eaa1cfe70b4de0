// Plain RMSNorm, forward and backward (SPEC 1.2, 3.1). Instantiated for float and double.
#pragma once
#include <cstdint>

#include "reference/spec/dtype.h"
#include "reference/spec/flags.h"

namespace v3b::ref {

// x [T,d], w [d] -> y [T,d]. `storage` is the dtype whose rounding norm_rounding=hf inserts before w.
template <class S>
void rmsnorm(int64_t T, int64_t d, S eps, const S* x, const S* w, S* y,
             spec::NormRounding rounding = spec::NormRounding::single,
             spec::DType storage = spec::DType::f64);
// Given dy [T,d]: dx [T,d] is overwritten, dw [d] is accumulated.
template <class S>
void rmsnorm_backward(int64_t T, int64_t d, S eps, const S* x, const S* w, const S* dy, S* dx,
                      S* dw);

// v rounded to a storage dtype and back (identity for f64; for f32 when S is double it rounds to float).
template <class S>
S round_to(S v, spec::DType dtype);

}  // namespace v3b::ref
