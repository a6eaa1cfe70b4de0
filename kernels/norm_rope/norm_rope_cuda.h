// RMSNorm, RoPE, SwiGLU, softmax and embedding on CUDA. Arguments as in reference/spec, pointers are device memory;
// work is put on the stream.
#pragma once
#include "kernels/core/cuda.h"
#include "reference/spec/rmsnorm.h"

namespace v3b::kern {

// Any d; bf16 or f32. Bound: bytes (x and y once; with residual x, r twice, y). One block a row.
void rmsnorm_cuda_simt(const spec::RmsNormArgs& a, CudaStream stream);

}  // namespace v3b::kern
