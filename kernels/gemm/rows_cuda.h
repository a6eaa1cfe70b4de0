// Row kernels beside the dense products on CUDA: quantisation, top-k backward, cross-entropy. Arguments as in
// reference/spec, pointers are device memory; work is put on the stream. All are bound by bytes.
#pragma once
#include <functional>
#include <vector>

#include "kernels/core/cuda.h"
#include "kernels/gemm/gemm.h"
#include "reference/spec/fp8_quant.h"
#include "reference/spec/lm_head_ce.h"
#include "reference/spec/topk.h"

namespace v3b::kern {

// Codes and scales have the reference's bits. Least bytes: x once, one code an element, the scales.
void fp8_quant_cuda_simt(const spec::Fp8QuantArgs& a, CudaStream stream);

// Least bytes: 4 T E written, 8 T K read (ste: 8 T E).
void topk_backward_cuda_simt(const spec::TopkBackwardArgs& a, CudaStream stream);

// Logits by gemm_cuda_mma into blocks of the scratch, each folded at once into (max, sum, argmax, label logit) of pieces
// of 4096 columns; one warp a row merges the pieces. NaN logits make lse and nll NaN and never win the argmax.
int64_t lm_head_ce_cuda_scratch_bytes(const spec::LmHeadCeArgs& a);
void lm_head_ce_cuda_mma(const spec::LmHeadCeArgs& a, void* scratch, CudaStream stream);
// The same around any product: calls it for every block of logits, one shape of lm_head_ce_cuda_products(a) each.
void lm_head_ce_cuda_by(const spec::LmHeadCeArgs& a, void* scratch, CudaStream stream,
                        const std::function<void(const GemmArgs&)>& product);
std::vector<GemmArgs> lm_head_ce_cuda_products(const spec::LmHeadCeArgs& a);

// The folding alone, of logits z [T, V] at row stride ldz. labels, nll and argmax may be null.
int64_t cross_entropy_rows_cuda_scratch_bytes(int64_t T, int64_t V);
void cross_entropy_rows_cuda_simt(int64_t T, int64_t V, const float* z, int64_t ldz,
                                  const int64_t* labels, float* nll, float* lse, int32_t* argmax,
                                  void* scratch, CudaStream stream);

}  // namespace v3b::kern
