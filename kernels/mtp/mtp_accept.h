// Batched speculative acceptance (SPEC 1.28). Least bytes: of p and q the rows that are needed; a
// rejected position reads its p and q row whole, an accepted one two numbers.
#pragma once
#include "reference/spec/speculative.h"

namespace v3b::kern {
// OpenMP over sequences, sums in double in index order: the same tokens as the reference.
void mtp_accept_cpu_simd(const spec::MtpAcceptArgs& a) noexcept;
const char* mtp_accept_cpu_simd_isa() noexcept;
}  // namespace v3b::kern
