// Element-wise parts of the expert kernels, for the instruction set of this machine. Internal to
// kernels/moe.
#pragma once
#include <cstdint>

namespace v3b::kern {

// out[i] = silu(gate[i]) * up[i], i < n, as bf16 or f32 (round: to bf16's values although f32).
void moe_swiglu_row(const float* gate, const float* up, int64_t n, bool to_bf16, bool round,
                    void* out) noexcept;
// The same for blocks [n, ld] with tokens innermost, straight into packed operands of the next
// product (gemm/strip.h): lane l of hidden unit r at out[l / 16 * group + step * 16 + l % 16]; step
// = r, or with `pairs` r / 2 with two bf16 a dword. Lanes of the last group beyond `lanes` and steps
// n (or n / 2 rounded up) to `steps` become zeros. gate and up: whole groups readable.
void moe_swiglu_lanes(const float* gate, const float* up, int64_t ld, int64_t n, int64_t lanes,
                      bool pairs, bool round, uint32_t* out, int64_t group, int64_t steps) noexcept;
// y += w * o in fp32, or with bf16 y = bf16(y + bf16(w * bf16(o))) in fp32 containers.
void moe_add_row(bool bf16, const float* o, float w, int64_t n, float* y) noexcept;
void moe_put_row(const float* y, int64_t n, bool to_bf16, void* out) noexcept;
const char* moe_rows_isa() noexcept;

}  // namespace v3b::kern
