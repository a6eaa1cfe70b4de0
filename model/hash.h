// A 64-bit hash for cache keys and fingerprints (FNV-1a over 8-byte words, then bytes). Not
// cryptographic: it tells files apart, it does not defend against anybody.
#pragma once
#include <cstdint>
#include <cstring>
#include <string>
#include <string_view>

namespace v3b::model {

inline uint64_t fnv1a64(std::string_view data, uint64_t h = 0xcbf29ce484222325ull) {
  constexpr uint64_t kPrime = 0x100000001b3ull;
  size_t i = 0;
  for (; i + 8 <= data.size(); i += 8) {
    uint64_t word;
    std::memcpy(&word, data.data() + i, 8);
    h = (h ^ word) * kPrime;
    h ^= h >> 29;
  }
  for (; i < data.size(); ++i) h = (h ^ static_cast<unsigned char>(data[i])) * kPrime;
  return (h ^ data.size()) * kPrime;
}

inline std::string hex64(uint64_t v) {
  static const char* kDigits = "0123456789abcdef";
  std::string s(16, '0');
  for (int i = 15; i >= 0; --i, v >>= 4) s[static_cast<size_t>(i)] = kDigits[v & 15];
  return s;
}

}  // namespace v3b::model
