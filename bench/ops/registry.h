// The explicit list of all ops (static self-registration vanishes from static libraries).
#pragma once
#include <memory>
#include <vector>

#include "bench/harness/op.h"

namespace v3b::bench {
std::vector<std::unique_ptr<OpBase>> all_ops();
}
