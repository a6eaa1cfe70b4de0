// f32 <-> bf16 rows. Both loops are plain integer code on 32-bit lanes that the compiler vectorises
// at the baseline; large arrays are split over the threads because one core cannot fill the memory
// channels.
#include <omp.h>

#include <cstring>

#include "kernels/core/team.h"
#include "kernels/gemm/gemm.h"

namespace v3b::kern {
namespace {

void narrow(const float* __restrict src, uint16_t* __restrict dst, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    uint32_t u;
    std::memcpy(&u, src + i, 4);
    const uint32_t rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
    const uint32_t quiet = (u >> 16) | 0x40u;
    dst[i] = static_cast<uint16_t>((u & 0x7fffffffu) > 0x7f800000u ? quiet : rounded);
  }
}

void widen(const uint16_t* __restrict src, float* __restrict dst, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    const uint32_t u = static_cast<uint32_t>(src[i]) << 16;
    std::memcpy(dst + i, &u, 4);
  }
}

template <class F>
void split(int64_t n, F&& f) {
  const int threads = team_for(6.0 * static_cast<double>(n), 0);
  if (threads == 1) return f(0, n);
#pragma omp parallel num_threads(threads)
  {
    const int64_t t = omp_get_num_threads(), i = omp_get_thread_num();
    const int64_t lo = n * i / t / 64 * 64, hi = i + 1 == t ? n : n * (i + 1) / t / 64 * 64;
    f(lo, hi - lo);
  }
}

}  // namespace

void convert_f32_to_bf16(const float* src, spec::bf16* dst, int64_t n) noexcept {
  auto* out = reinterpret_cast<uint16_t*>(dst);
  split(n, [&](int64_t lo, int64_t count) { narrow(src + lo, out + lo, count); });
}
void convert_row_f32_to_bf16(const float* src, spec::bf16* dst, int64_t n) noexcept {
  narrow(src, reinterpret_cast<uint16_t*>(dst), n);
}

void convert_bf16_to_f32(const spec::bf16* src, float* dst, int64_t n) noexcept {
  const auto* in = reinterpret_cast<const uint16_t*>(src);
  split(n, [&](int64_t lo, int64_t count) { widen(in + lo, dst + lo, count); });
}

}  // namespace v3b::kern
