// Block scales of an FP8 product (SPEC 1.23) in the layouts that library kernels read.
#pragma once
#include "kernels/core/cuda.h"

namespace v3b::kern {

struct Fp8ScalesArgs {
  int64_t m, padded_m;  // rows of the activations; padded_m >= m
  int64_t nb, kb;       // blocks of 128 weight rows, of k
  const float* sa;      // [m, kb]
  float* to_a;          // [kb, padded_m], pad columns 0
  const float* sb;      // [nb, kb]
  float* to_b;       // [nb, b_stride], pad columns 0; or, b_transposed: [kb, nb]. Null: left alone
  int64_t b_stride;  // >= kb
  bool b_transposed;
};
// One launch, a thread an element; bound by latency: 8 bytes an element, at most some MB of scales.
void fp8_scales_cuda_simt(const Fp8ScalesArgs& a, CudaStream stream);

}  // namespace v3b::kern
