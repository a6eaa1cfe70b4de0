// Plain RoPE and its backward (SPEC 1.3, 3.2). Instantiated for float and double.
#pragma once
#include <cstdint>

#include "model/rope_table.h"
#include "reference/spec/rope.h"

namespace v3b::ref {

// cos, sin [positions, half] in S, computed in float64 from the frequencies and rounded once;
// multiplier included.
template <class S>
void rope_table(const model::RopeFreqs& f, int64_t first_position, int64_t positions, S* cos,
                S* sin);

// x [T, n_h, d_r] dense -> y (may be x). cos, sin [T, d_r/2]: row t belongs to token t. inverse
// rotates back and undoes the permutation of interleaved_to_half; because rotation is orthogonal it
// is also the backward (dy -> dx).
template <class S>
void rope(int64_t T, int64_t n_h, int64_t d_r, spec::RopeForm form, bool inverse, const S* x,
          const S* cos, const S* sin, S* y);

}  // namespace v3b::ref
