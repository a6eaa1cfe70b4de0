// Routed and shared experts: dispatch -> grouped SwiGLU -> weighted combine (SPEC 1.13, 1.14, 1.16).
#pragma once
#include "reference/spec/dtype.h"
#include "reference/spec/flags.h"
#include "reference/spec/glossary.h"

namespace v3b::spec {

struct FfnPointers {
  const void* gate;  // [m, d]; FP8: codes with gate_scale [ceil(m/128), ceil(d/128)]
  const void* up;    // [m, d]
  const void* down;  // [d, m]
  const float *gate_scale, *up_scale, *down_scale;  // null unless FP8
};

struct MoeExpertsArgs {
  int64_t T, d, m, E, K;
  int64_t shared_m;              // N_s * m; 0: no shared expert
  DType x_dtype;                 // f32 or bf16: x and y
  DType w_dtype;                 // f32, bf16 or f8e4m3
  const void* x;                 // [T, d]
  const int32_t* idx;            // [T, K]; < 0: unused slot
  const float* weight;           // [T, K]
  const FfnPointers* experts;    // [E]; experts that nobody chose may hold NaN and are never read
  FfnPointers shared;
  void* y;                       // [T, d], overwritten; the caller adds the residual once
};

}  // namespace v3b::spec
