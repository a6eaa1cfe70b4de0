// RMSNorm, RoPE, SwiGLU, softmax and embedding on CUDA. Arguments as in reference/spec, pointers are device memory;
// work is put on the stream. All are bound by bytes; 16-byte accesses where rows and pointers are 16-byte aligned, a
// plain path elsewhere. T = 0 is legal everywhere.
#pragma once
#include "kernels/core/cuda.h"
#include "kernels/norm_rope/quant_out.h"
#include "reference/spec/embedding.h"
#include "reference/spec/rmsnorm.h"
#include "reference/spec/rope.h"
#include "reference/spec/swiglu.h"

namespace v3b::kern {

// Any d; bf16 or f32. Least bytes: x and y once; with residual x, r twice, y. One block a row.
void rmsnorm_cuda_simt(const spec::RmsNormArgs& a, CudaStream stream);

// RMSNorm, then quantisation of the bf16-rounded y: the bits of rmsnorm followed by fp8_quant. dtype bf16 (else throws
// v3b::Error). a.y: also written, unless null.
void rmsnorm_quant_cuda_simt(const spec::RmsNormArgs& a, const QuantOut& q, CudaStream stream);

// Any table rows, strides, types and form; d_r even and at most 512 (else throws v3b::Error). y may be x.
void rope_cuda_simt(const spec::RopeArgs& a, CudaStream stream);

void swiglu_cuda_simt(const spec::SwigluArgs& a, CudaStream stream);
// SwiGLU, then quantisation of y rounded to out_type: the bits of swiglu followed by fp8_quant. a.y: also written,
// unless null.
void swiglu_quant_cuda_simt(const spec::SwigluArgs& a, const QuantOut& q, CudaStream stream);

// One warp a row up to n = 1024; longer rows are split over blocks, which leave (max, sum) in the scratch and read
// their part again (from L2 where it fits) to write y. NaN anywhere makes the row NaN.
int64_t softmax_cuda_scratch_bytes(const spec::SoftmaxArgs& a);  // 0: scratch may be null
void softmax_cuda_simt(const spec::SoftmaxArgs& a, void* scratch, CudaStream stream);

// Rows of any element type.
void embedding_cuda_simt(const spec::EmbeddingArgs& a, CudaStream stream);

}  // namespace v3b::kern
