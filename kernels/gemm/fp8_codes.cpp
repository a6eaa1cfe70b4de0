#include "kernels/gemm/fp8_codes.h"

#include <cmath>
#include <memory>

#include "kernels/gemm/fp8.h"
#include "reference/spec/dtype.h"

namespace v3b::kern {
namespace {

// Codes of the 128 significands at 2^exponent times the scale's binade; scale in [1, 2).
void codes_of(float scale, int exponent, int minus, uint8_t* out) {
  for (int m = 0; m < 128; ++m) {
    const float x = std::ldexp(1.0F + static_cast<float>(m) / 128.0F, exponent);
    out[m] = static_cast<uint8_t>(spec::to_f8e4m3(x / scale).bits - minus);
  }
}

}  // namespace

// An element's exponent beside the scale's, e = ex - es + 11 (0 from there down): e <= 0 is code 0 (below 2^-10), 1..5
// have planes of their own (down to code 0 and up to 2^-5, which is above the least normal code's 2^-6), from 6 on
// the code is 8 e + plane 0, modulo 256.
const Fp8CodeTable& fp8_code_table() {
  static const std::unique_ptr<const Fp8CodeTable> table = [] {
    auto t = std::make_unique<Fp8CodeTable>();
    for (int64_t r = 0; r < Fp8CodeTable::kRows; ++r) {
      float scale = (1.0F + static_cast<float>(r) / 128.0F) / 448.0F;
      if (r == Fp8CodeTable::kPowerOfTwo) scale = 1;
      if (r == Fp8CodeTable::kLeastAct) scale = 1e-4F / 448.0F;
      if (r == Fp8CodeTable::kLeastRecord) scale = 1e-4F;
      scale = std::ldexp(scale, -std::ilogb(scale));
      constexpr int kNormal = 12;  // any e with only normal codes
      codes_of(scale, kNormal - 11, 8 * kNormal, t->plane[r][0]);
      for (int e = 1; e < Fp8CodeTable::kPlanes; ++e) codes_of(scale, e - 11, 0, t->plane[r][e]);
    }
    return t;
  }();
  return *table;
}

bool fp8_codes_avx512bf16_supported() { return fp8_gemm_avx512bf16_supported(); }

}  // namespace v3b::kern
