// Entry points of the rate loops, one file an instruction set (DESIGN 1, rule 6). Each runs
// `rounds` rounds on the calling thread, returns the operations done (a multiply-add is 2) and adds
// a value to *sink, so that nothing is optimised away.
#pragma once
#include <cstdint>

namespace v3b::bench {
double rate_f32_avx2(int64_t rounds, double* sink) noexcept;
double rate_f64_avx2(int64_t rounds, double* sink) noexcept;
double rate_f32_avx512(int64_t rounds, double* sink) noexcept;
double rate_f64_avx512(int64_t rounds, double* sink) noexcept;
double rate_int8_avx512(int64_t rounds, double* sink) noexcept;  // VNNI
double rate_bf16_avx512(int64_t rounds, double* sink) noexcept;  // VDPBF16PS
double rate_bf16_amx(int64_t rounds,
                     double* sink) noexcept;  // needs tile permission of the process
double rate_int8_amx(int64_t rounds, double* sink) noexcept;
}  // namespace v3b::bench
