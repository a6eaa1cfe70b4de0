// The first n of 16 lanes, for the files for AVX-512 (in an anonymous namespace on purpose).
#pragma once
#include <immintrin.h>

#include <cstdint>

namespace v3b::kern {
namespace {

inline __mmask16 first_n(int64_t n) noexcept {
  return static_cast<__mmask16>(n >= 16 ? 0xffffu : (1u << n) - 1u);
}

}  // namespace
}  // namespace v3b::kern
