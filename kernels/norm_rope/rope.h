// RoPE from given tables (SPEC 1.3). FLOPs 6 per pair; least bytes 2e a rotated element.
#pragma once
#include "reference/spec/rope.h"

namespace v3b::kern {
void rope_cpu_simd(const spec::RopeArgs& a) noexcept;  // Highway, OpenMP over tokens
const char* rope_cpu_simd_isa() noexcept;
}  // namespace v3b::kern
