// Few rows times a big weight matrix (decode): no packing, the weights stream through once.
// Internal to gemm(), which asks gemv_takes() first. SPEC 0.1: y = x W^T, W [N, K].
#pragma once
#include <string>

#include "kernels/gemm/gemm.h"

namespace v3b::kern {

// True when the streaming kernel is the faster one for this problem: M small, A row-major, B [N,
// K].
bool gemv_takes(const GemmArgs& g) noexcept;
// Same contract as gemm(); only for problems that gemv_takes() accepts.
void gemv(const GemmArgs& g) noexcept;
std::string gemv_isa(spec::DType ab_type);  // what gemv() dispatches to for these operands

// AVX512_BF16, bf16 only. A packed once a call as [ceil(K/32)][M][32], zeros past K (rows at a stride of a multiple of
// 4096 bytes would share the sets of L1); then rows [n0, n1) of B against it, one thread.
void gemv_pack_avx512bf16(const GemmArgs& g, spec::bf16* out) noexcept;
void gemv_packed_avx512bf16(const GemmArgs& g, const spec::bf16* packed, int64_t n0,
                            int64_t n1) noexcept;

}  // namespace v3b::kern
