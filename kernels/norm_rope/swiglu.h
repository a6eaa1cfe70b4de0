// Elementwise and row kernels beside the norms: SwiGLU (SPEC 1.13), softmax rows (1.5), embedding
// gather (1.1). Memory-bound: least bytes 3Tme, 2Tn*4, 2Tde.
#pragma once
#include <functional>

#include "kernels/norm_rope/quant_out.h"
#include "reference/spec/embedding.h"
#include "reference/spec/swiglu.h"

namespace v3b::kern {
void swiglu_cpu_simd(const spec::SwigluArgs& a) noexcept;
// SwiGLU, then 1x128 FP8 quantisation of y rounded to bf16: the bits of swiglu followed by fp8_quant. out_type bf16; a.y is
// also written, unless null.
void swiglu_quant_cpu_simd(const spec::SwigluArgs& a, const QuantOut& q) noexcept;
const char* swiglu_cpu_simd_isa() noexcept;
void softmax_cpu_simd(const spec::SoftmaxArgs& a) noexcept;
const char* softmax_cpu_simd_isa() noexcept;
// oneDNN's, prepared for these pointers (y not null); throws dnnl::error where it has none.
std::function<void()> softmax_cpu_onednn(const spec::SoftmaxArgs& a);
void embedding_cpu_copy(const spec::EmbeddingArgs& a) noexcept;
}  // namespace v3b::kern
