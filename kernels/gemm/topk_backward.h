// Backward of a top-k selection (SPEC 1.24): exact scatter or straight-through copy. Memory traffic
// only.
#pragma once
#include "reference/spec/topk.h"

namespace v3b::kern {
void topk_backward_cpu_simd(const spec::TopkBackwardArgs& a) noexcept;
}
