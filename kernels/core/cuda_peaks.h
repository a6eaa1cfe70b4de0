// What the GPU can do in these minutes: bandwidth and arithmetic rates, each probe some milliseconds, the best of a few
// passes. Plain C++; 0 where there is no device (also emulated: times mean nothing) or no such instruction.
#pragma once

namespace v3b::kern {

double cuda_read_bytes_per_s();  // linear reads of a buffer several times the L2
double cuda_copy_bytes_per_s();  // read + written
double cuda_f32_flop_per_s();    // FMA from registers
// Tensor cores, dense, fp32 sums: mma.sync from registers, on 9.0 also wgmma from shared memory, which alone reaches
// Hopper's peak (mma.sync gets about 62% of it). The better of the two.
double cuda_bf16_flop_per_s();
double cuda_fp8_flop_per_s();           // 8.9 and later
const char* cuda_tensor_instruction();  // "wgmma" | "mma.sync": what the two above ran best with

// Reads past the L2, in stream order, so that what was in it is gone.
void cuda_empty_l2();

namespace detail {
// One launch of `rounds` rounds on every SM; returns the operations that it does. Needs a 9.0 device.
double wgmma_launch_bf16(int sms, int rounds, float* sink);
double wgmma_launch_fp8(int sms, int rounds, float* sink);
}  // namespace detail

}  // namespace v3b::kern
