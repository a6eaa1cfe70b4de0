// Element types and their exact bit conversions. Plain integer code, internal linkage on purpose
// (DESIGN 1, rule 6: files for one instruction set may not share inline functions with others).
#pragma once
#include <bit>
#include <cstdint>

#if defined(__CUDACC__)
#define V3B_HD static inline __host__ __device__
#else
#define V3B_HD [[maybe_unused]] static inline
#endif

namespace v3b::spec {

enum class DType : uint8_t { f64, f32, bf16, f16, f8e4m3, i64, i32, u8 };

V3B_HD constexpr int64_t dtype_bytes(DType t) {
  switch (t) {
    case DType::f64:
    case DType::i64:
      return 8;
    case DType::f32:
    case DType::i32:
      return 4;
    case DType::bf16:
    case DType::f16:
      return 2;
    case DType::f8e4m3:
    case DType::u8:
      return 1;
  }
  return 0;
}
V3B_HD constexpr const char* dtype_name(DType t) {
  switch (t) {
    case DType::f64:
      return "f64";
    case DType::f32:
      return "f32";
    case DType::bf16:
      return "bf16";
    case DType::f16:
      return "f16";
    case DType::f8e4m3:
      return "f8e4m3";
    case DType::i64:
      return "i64";
    case DType::i32:
      return "i32";
    case DType::u8:
      return "u8";
  }
  return "?";
}

// Storage-only types: bits, no arithmetic.
struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};
struct f8e4m3 {
  uint8_t bits;
};

V3B_HD float to_float(bf16 x) { return std::bit_cast<float>(static_cast<uint32_t>(x.bits) << 16); }
// Round to nearest even; NaN stays NaN (quiet).
V3B_HD bf16 to_bf16(float x) {
  uint32_t u = std::bit_cast<uint32_t>(x);
  if ((u & 0x7fffffffu) > 0x7f800000u) return bf16{static_cast<uint16_t>((u >> 16) | 0x40u)};
  u += 0x7fffu + ((u >> 16) & 1u);
  return bf16{static_cast<uint16_t>(u >> 16)};
}

V3B_HD float to_float(f16 h) {
  const uint32_t sign = static_cast<uint32_t>(h.bits & 0x8000u) << 16;
  const uint32_t exp = (h.bits >> 10) & 0x1fu, man = h.bits & 0x3ffu;
  if (exp == 31) return std::bit_cast<float>(sign | 0x7f800000u | (man << 13));
  if (exp != 0) return std::bit_cast<float>(sign | ((exp + 112u) << 23) | (man << 13));
  const float m = static_cast<float>(man) * 0x1p-24f;  // exact
  return sign ? -m : m;
}
V3B_HD f16 to_f16(float x) {
  const uint32_t u = std::bit_cast<uint32_t>(x);
  const uint16_t sign = static_cast<uint16_t>((u >> 16) & 0x8000u);
  const uint32_t a = u & 0x7fffffffu;
  if (a > 0x7f800000u) return f16{static_cast<uint16_t>(sign | 0x7e00u)};
  if (a >= 0x477ff000u)
    return f16{static_cast<uint16_t>(sign | 0x7c00u)};  // >= 65520 rounds to inf
  if (a < 0x38800000u) {  // below 2^-14: subnormal, adding 0.5 puts the rounding at the right bit
    const float r = std::bit_cast<float>(a) + 0.5f;
    return f16{static_cast<uint16_t>(sign | (std::bit_cast<uint32_t>(r) - 0x3f000000u))};
  }
  const uint32_t r = a + 0xfffu + ((a >> 13) & 1u);
  return f16{static_cast<uint16_t>(sign | ((r - 0x38000000u) >> 13))};
}

// E4M3FN: bias 7, max 448, no infinity, NaN = 0x7F / 0xFF.
V3B_HD float to_float(f8e4m3 x) {
  const uint32_t exp = (x.bits >> 3) & 0xfu, man = x.bits & 7u;
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x80u) << 24;
  if (exp == 15 && man == 7) return std::bit_cast<float>(sign | 0x7fc00000u);
  if (exp == 0) {
    const float m = static_cast<float>(man) * 0x1p-9f;
    return sign ? -m : m;
  }
  return std::bit_cast<float>(sign | ((exp + 120u) << 23) | (man << 20));
}
// Round to nearest even, saturating to +-448 (infinities too); NaN -> NaN code.
V3B_HD f8e4m3 to_f8e4m3(float x) {
  const uint32_t u = std::bit_cast<uint32_t>(x);
  const uint8_t sign = static_cast<uint8_t>((u >> 24) & 0x80u);
  const uint32_t a = u & 0x7fffffffu;
  if (a > 0x7f800000u) return f8e4m3{static_cast<uint8_t>(sign | 0x7fu)};
  if (a >= 0x43e00000u) return f8e4m3{static_cast<uint8_t>(sign | 0x7eu)};  // >= 448
  if (a < 0x3c800000u) {  // below 2^-6: multiples of 2^-9; 2^14 + a rounds there
    const float r = std::bit_cast<float>(a) + 0x1p14f;
    return f8e4m3{static_cast<uint8_t>(sign | (std::bit_cast<uint32_t>(r) - 0x46800000u))};
  }
  const uint32_t r = a + 0x7ffffu + ((a >> 20) & 1u);
  const uint32_t code = (r >> 20) - (120u << 3);
  return f8e4m3{static_cast<uint8_t>(sign | (code > 0x7eu ? 0x7eu : code))};
}

// Smallest power of two >= x for finite x > 0, as UE8M0 scales need it (SPEC 1.22).
V3B_HD float ceil_pow2(float x) {
  uint32_t u = std::bit_cast<uint32_t>(x);
  if (u & 0x7fffffu) u = (u & 0x7f800000u) + 0x00800000u;
  return std::bit_cast<float>(u);
}

}  // namespace v3b::spec
