// Weighted sum of the experts' rows. It shares loads, stores and target with the dispatch, so its
// loop stands in moe_dispatch.cpu_simd.cpp.
#include "kernels/moe/moe.h"

namespace v3b::kern {
void moe_combine_cpu_simd(const spec::MoeCombineArgs& a) noexcept { moe_combine_rows(a); }
}  // namespace v3b::kern
