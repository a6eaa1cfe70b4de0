// One element of the 8-bit cache record (SPEC 1.9) as the attention uses it. Device and host.
#pragma once
#include <cstdint>

#include "reference/spec/dtype.h"

namespace v3b::kern {

// Bytes, since records of odd dimensions are not aligned.
V3B_HD float record_float(const uint8_t* p) {
  return std::bit_cast<float>(static_cast<uint32_t>(p[0]) | static_cast<uint32_t>(p[1]) << 8 |
                              static_cast<uint32_t>(p[2]) << 16 |
                              static_cast<uint32_t>(p[3]) << 24);
}
// Element i of d_c latent ones and then the rope part: code times scale, rounded to bf16.
V3B_HD float record_element(const uint8_t* row, int64_t i, int64_t d_c) {
  const uint8_t* scales = row + d_c;
  if (i < d_c) {
    const float v = spec::to_float(spec::f8e4m3{row[i]}) * record_float(scales + 4 * (i / 128));
    return spec::to_float(spec::to_bf16(v));
  }
  const uint8_t* p = scales + 4 * ((d_c + 127) / 128) + 2 * (i - d_c);
  return spec::to_float(spec::bf16{static_cast<uint16_t>(p[0] | p[1] << 8)});
}

}  // namespace v3b::kern
