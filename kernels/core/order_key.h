// Floats as unsigned integers that order like the values: larger first, ties to the lower index, NaN below every number
// (SPEC 0.1, 1.29). Host and device.
#pragma once
#include <bit>
#include <cstdint>
#include <limits>

#include "reference/spec/dtype.h"

namespace v3b::kern {

// a < b as floats <=> order_key(a) < order_key(b); -0 equals 0; NaN: 1; 0 is never returned.
V3B_HD uint32_t order_key(float v) {
  if (v != v) return 1;
  const uint32_t u = std::bit_cast<uint32_t>(v + 0.0f);  // -0 becomes 0
  return (u & 0x80000000u) != 0 ? ~u : u | 0x80000000u;
}
// The value again; -inf for NaN.
V3B_HD float order_value(uint32_t key) {
  if (key < 2) return -std::numeric_limits<float>::infinity();
  return std::bit_cast<float>((key & 0x80000000u) != 0 ? key & 0x7fffffffu : ~key);
}
// The largest of these is the largest value of the lowest index. 0: nothing.
V3B_HD uint64_t pick_key(uint32_t order, int64_t index) {
  return static_cast<uint64_t>(order) << 32 | (0xffffffffu - static_cast<uint32_t>(index));
}
V3B_HD int32_t pick_index(uint64_t key) {
  return static_cast<int32_t>(0xffffffffu - static_cast<uint32_t>(key));
}
V3B_HD float pick_value(uint64_t key) { return order_value(static_cast<uint32_t>(key >> 32)); }

}  // namespace v3b::kern
