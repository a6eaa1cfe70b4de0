// bf16 to E4M3 codes by table look-up (SPEC 1.22, 1.9). A scale is a float of the block's largest magnitude, so with bf16
// values its significand is one of 128 (and three constants), and the significand of a code is a function of two
// significands of 7 bits: look-ups give the reference's codes bit for bit, with no division at all. AVX512_VBMI, at the level
// AVX512_BF16. Internal to kernels.
#pragma once
#include <cstdint>

namespace v3b::kern {

// One row for every significand of a scale; plane 0: what a normal code has beside its exponent, planes 1-5: whole codes of
// the five binades where codes become subnormal.
struct Fp8CodeTable {
  static constexpr int64_t kPlanes = 6, kPowerOfTwo = 128, kLeastAct = 129, kLeastRecord = 130,
                           kRows = 131;
  alignas(64) uint8_t plane[kRows][kPlanes][128];
};
const Fp8CodeTable& fp8_code_table();  // made once a process, from the definition
bool fp8_codes_avx512bf16_supported();

enum class Fp8Scale {
  act_fp32,     // max(amax, 1e-4) / 448
  act_ue8m0,    // ... rounded up to a power of two
  record_free,  // max(amax / 448, 1e-4)
  record_pow2,
};
// Blocks of 128 values that follow each other -> codes [blocks * 128] and scales [blocks]. Stops before a block with a NaN
// or an infinity: returns the number of blocks done. `stream`: past the caches, codes aligned to 64 (the caller fences). `ask`: for what
// follows x, which is wrong where x lies in L1 already.
int64_t fp8_quantise_blocks_cpu_avx512bf16(const Fp8CodeTable& table, Fp8Scale kind, bool stream,
                                           const uint16_t* x, int64_t blocks, uint8_t* codes,
                                           float* scales, bool ask = true) noexcept;

// `blocks` <= kFp8WeightBlocks blocks of `rows` x 128 side by side (SPEC 1.22, weights). Returns a bit for each block that
// is left undone: not finite, or its scale far out.
inline constexpr int64_t kFp8WeightBlocks = 4;
uint32_t fp8_quantise_weights_cpu_avx512bf16(const Fp8CodeTable& table, bool stream,
                                             const uint16_t* x, int64_t stride, int64_t rows,
                                             int64_t blocks, uint8_t* codes,
                                             float* scales) noexcept;

}  // namespace v3b::kern
