// Where a fused kernel leaves FP8 codes and scales of its rows.
#pragma once
#include "reference/spec/fp8_quant.h"

namespace v3b::kern {

// 1x128 codes and scales (SPEC 1.22) of rows [T, n].
struct QuantOut {
  spec::f8e4m3* codes;  // [T, n]
  float* scales;        // [T, ceil(n/128)]
  spec::ActScale act_scale;
};

}  // namespace v3b::kern
