// Plain block-scaled FP8 product (SPEC 1.23) and an emulation of Hopper's short accumulator.
#pragma once
#include <cstdint>

#include "reference/spec/dtype.h"
#include "reference/spec/fp8_gemm.h"

namespace v3b::ref {

// C [m,n] = sum over 128-blocks of sa*sb*(dot of codes), everything in S, no output rounding.
// qa [m,k], sa [m,ceil(k/128)], qb [n,k], sb [ceil(n/128), ceil(k/128)].
template <class S>
void fp8_gemm(int64_t m, int64_t n, int64_t k, const spec::f8e4m3* qa, const float* sa,
              const spec::f8e4m3* qb, const float* sb, S* c);

// The same on an emulated Hopper tensor core: 32 products at a time are aligned with the running
// sum to the largest exponent among them and cut (towards zero) to `mantissa_bits` bits before they
// are added; after every `promote_every` elements of K (0: never before the end) the sum is
// promoted to fp32 and starts from zero. Segments longer than 128 take the scales into the
// products, since a scale may change inside them.
struct HopperAccumulator {
  int64_t promote_every = 128;  // 128 (DeepSeek), 512, ... ; 0 = whole K
  int mantissa_bits = 14;
};
void fp8_gemm_hopper(int64_t m, int64_t n, int64_t k, const spec::f8e4m3* qa, const float* sa,
                     const spec::f8e4m3* qb, const float* sb, float* c, HopperAccumulator acc = {});

}  // namespace v3b::ref
