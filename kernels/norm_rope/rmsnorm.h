// RMSNorm, optionally fused with the residual add (SPEC 1.2). FLOPs 4Td; least bytes 2Tde, with residual 4Tde.
#pragma once
#include "reference/spec/rmsnorm.h"

namespace v3b::kern {
void rmsnorm_cpu_simd(const spec::RmsNormArgs& a) noexcept;  // Highway, OpenMP over rows; f32 and bf16
const char* rmsnorm_cpu_simd_isa() noexcept;                 // the Highway target that runs here
}  // namespace v3b::kern
