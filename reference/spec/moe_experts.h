// Routed and shared experts: dispatch -> grouped SwiGLU -> weighted combine
// (SPEC 1.13, 1.14, 1.16).
#pragma once
#include "reference/spec/dtype.h"
#include "reference/spec/flags.h"
#include "reference/spec/glossary.h"

namespace v3b::spec {

// A case of the op. Routes are synthetic and follow from the shape alone
// (reference/synthetic_routes.h).
struct MoeExpertsShape {
  int64_t T = 1, d = 7168, m = 2048, E = 16, K = 8;
  int64_t shared_m = 2048;
  double zipf = 0;  // at most one of zipf, hot, ratio; all 0: uniform
  int64_t hot = 0;
  double ratio = 0;
  MoeAccum moe_accum = MoeAccum::fp32;
  DType w_dtype = DType::bf16;  // of the weights: f32, bf16, f8e4m3
  // of x and y: f32 or bf16. f8e4m3: x is codes with 1x128 scales, as dispatched; the hidden rows are
  // rounded to bf16 and quantised 1x128 (fp32 scales) before W_down; weights are f8e4m3 and y is
  // bf16. SPEC 1.13, 1.22, 1.23.
  DType dtype = DType::bf16;
  template <class S, class V>
  static void visit(S& s, V&& v) {
    v("T", s.T);
    v("d", s.d);
    v("m", s.m);
    v("E", s.E);
    v("K", s.K);
    v("shared_m", s.shared_m);
    v("zipf", s.zipf);
    v("hot", s.hot);
    v("ratio", s.ratio);
    v("moe_accum", s.moe_accum);
    v("w_dtype", s.w_dtype);
    v("dtype", s.dtype);
  }
};

struct FfnPointers {
  const void* gate;  // [m, d]; FP8: codes with gate_scale [ceil(m/128), ceil(d/128)]
  const void* up;    // [m, d]
  const void* down;  // [d, m]
  const float *gate_scale, *up_scale, *down_scale;  // null unless FP8
};

struct MoeExpertsArgs {
  int64_t T, d, m, E, K;
  int64_t shared_m;            // N_s * m; 0: no shared expert
  DType x_dtype;               // f32 or bf16: x and y; f8e4m3: x, with bf16 y
  DType w_dtype;               // f32, bf16 or f8e4m3
  const void* x;               // [T, d]
  const int32_t* idx;          // [T, K]; < 0: unused slot
  const float* weight;         // [T, K]
  const FfnPointers* experts;  // [E]; experts that nobody chose may hold NaN and are never read
  FfnPointers shared;
  void* y;  // [T, d], overwritten; the caller adds the residual once
  // fp32: experts' outputs are summed in fp32 and y is rounded once. bf16: each expert's output,
  // its product with the gate and every partial sum are rounded to bf16 (experts ascending, the
  // shared one last), whatever x_dtype is. SPEC 1.14.
  MoeAccum moe_accum = MoeAccum::fp32;
  const float* x_scale = nullptr;  // [T, ceil(d/128)] of E4M3 x, else null
};

}  // namespace v3b::spec
