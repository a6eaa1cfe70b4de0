// Speculative acceptance and sampling on CUDA (SPEC 1.28). Pointers are device memory; work is put on the stream, nothing
// comes back to the host. B = 0 or rows = 0 is legal.
#pragma once
#include "kernels/core/cuda.h"
#include "kernels/mtp/sampling.h"
#include "reference/spec/speculative.h"

namespace v3b::kern {

// The reference's tokens for the same uniforms: sums in double, blockwise (the reference sums in index order; a token can
// differ only where u * sum lies within 1e-13 of a step of the cumulative sum). gamma = 0 is legal and is plain sampling
// (or, greedy, the argmax) of B rows: draft and q are not read then. NaN never wins the argmax.
// Bound by bytes: greedy 4 V (gamma + 1) a sequence, sampling 4 V or 8 V and 4096 entries again.
int64_t mtp_accept_cuda_scratch_bytes(const spec::MtpAcceptArgs& a);
void mtp_accept_cuda_simt(const spec::MtpAcceptArgs& a, void* scratch, CudaStream stream);

// p = softmax(logits / temperature), cut to the smallest set of largest probabilities whose sum reaches top_p (the one
// that crosses the mark stays; ties to the lower id), renormalised. Weights exp((z - max) / temperature) in fp32, sums in
// integers of 2^-43. V <= 2^20, temperature > 0, 0 < top_p <= 1 (else throws v3b::Error).
struct SamplingArgs {
  int64_t rows, V;
  double temperature, top_p;
  const float* logits;  // [rows, V] at stride
  int64_t stride;       // elements
  float* p;             // [rows, V] dense; not the logits
};
void sampling_distribution_cuda_simt(const SamplingArgs& a, CudaStream stream);

}  // namespace v3b::kern
