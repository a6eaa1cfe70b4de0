// RoPE from given tables (SPEC 1.3): (a, b) -> (a cos - b sin, a sin + b cos) for every pair of the
// slice.
#pragma once
#include "reference/spec/dtype.h"
#include "reference/spec/flags.h"
#include "reference/spec/glossary.h"

namespace v3b::spec {

// Where a pair's two elements lie before and after. Scores are the same for all as long as q and k
// agree; a cached key is not: never mix caches (SPEC 1.3).
enum class RopeForm : uint8_t {
  interleaved,          // (2i, 2i+1) -> (2i, 2i+1): checkpoint layout, rope_layout=interleaved
  interleaved_to_half,  // (2i, 2i+1) -> (i, i + d_r/2): transformers with rope_interleave,
                        // rope_layout=hf_halfsplit
  half,                 // (i, i + d_r/2) -> same: checkpoints with rope_interleave=false
};
V3B_HD constexpr RopeForm rope_form(RopeLayout layout, bool checkpoint_interleaved) {
  if (!checkpoint_interleaved) return RopeForm::half;
  return layout == RopeLayout::interleaved ? RopeForm::interleaved : RopeForm::interleaved_to_half;
}

struct RopeShape {
  int64_t T = 512, n_h = 128, d_r = 64;
  RopeLayout rope_layout = RopeLayout::interleaved;
  DType dtype = DType::bf16;
  template <class S, class V>
  static void visit(S& s, V&& v) {
    v("T", s.T);
    v("n_h", s.n_h);
    v("d_r", s.d_r);
    v("rope_layout", s.rope_layout);
    v("dtype", s.dtype);
  }
};

struct RopeArgs {
  int64_t T, n_h, d_r;
  RopeForm form;
  bool inverse;          // rotate by -angle, and undo the permutation: the backward too
  DType x_type, y_type;  // f32 or bf16 each; arithmetic in f32
  const void* x;         // [T, n_h, d_r] at strides
  int64_t x_token_stride, x_head_stride;  // elements
  void* y;                                // may be x itself if strides and types agree
  int64_t y_token_stride, y_head_stride;
  const float* cos;  // [positions, d_r/2]
  const float* sin;
  const int32_t* positions;  // [T] rows of the tables, or null: row t
};

}  // namespace v3b::spec
