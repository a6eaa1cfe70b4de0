// Counter-based random numbers of the fills: value = f(seed, stream, index), so that any thread
// makes any part and every machine gets the same bits (integer arithmetic and one exact
// multiplication; no libm).
#pragma once
#include <cstdint>
#include <string_view>

namespace v3b::bench {

inline uint64_t mix64(uint64_t z) {  // splitmix64's finaliser
  z += 0x9e3779b97f4a7c15ull;
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
  return z ^ (z >> 31);
}

inline uint64_t stream_key(uint64_t seed, std::string_view name) {
  uint64_t h = mix64(seed ^ 0x5633464d42656e63ull);
  for (char c : name) h = mix64(h ^ static_cast<unsigned char>(c));
  return h;
}

inline uint64_t random_u64(uint64_t key, uint64_t i) {
  return mix64(key ^ (i * 0xd1342543de82ef95ull));
}

// Near-normal with mean 0 and deviation 1: the sum of four 16-bit uniforms (Irwin-Hall), |z|
// < 3.47.
inline float random_normal(uint64_t key, uint64_t i) {
  const uint64_t r = random_u64(key, i);
  const int32_t sum = static_cast<int32_t>(r & 0xffff) + static_cast<int32_t>((r >> 16) & 0xffff) +
                      static_cast<int32_t>((r >> 32) & 0xffff) + static_cast<int32_t>(r >> 48);
  return static_cast<float>(2 * sum - 4 * 65535) * 1.32160e-5f;  // 1 / (2 * 65536 * sqrt(4/12))
}

}  // namespace v3b::bench
