// bf16 to E4M3 codes by VPERMI2B (fp8_codes.h).
//
// Bound: 64 values take 2 doublings and 2 maxima (shared with nothing else of the first pass), then 3 permutations that part
// low and high bytes, one look-up of 128 bytes, and 6 byte-wide operations: 14, where arithmetic on 32-bit lanes took 54,
// against 192 bytes of traffic. Reductions and scales of a block are about 20 scalar and narrow instructions more. So
// some 10-14 cycles for 64 values beside 15 of the memory at 13 bytes a cycle and core: bound by memory, closely.
// GCC 12 warns about the undefined registers inside its own AVX-512 headers (its bug 105593).
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC target("avx512vbmi")
#include "kernels/gemm/fp8_codes.h"

#include <immintrin.h>

namespace v3b::kern {
namespace {

constexpr int64_t kBlock = 128, kGroup = 8;  // blocks whose reductions and divisions overlap
constexpr uint32_t kInfinity = 0x7f80;
constexpr int64_t kAhead = 2048;  // bytes

float as_float(uint32_t u) { return __builtin_bit_cast(float, u); }
uint32_t as_bits(float f) { return __builtin_bit_cast(uint32_t, f); }

struct Scale {
  float value;
  const uint8_t* planes;  // its row of the table
};

float ceil_pow2(float s) {
  const uint32_t u = as_bits(s);
  return as_float((u & 0x7fffffu) != 0 ? (u & 0x7f800000u) + 0x800000u : u);
}

template <Fp8Scale kKind>
inline Scale scale_of(const Fp8CodeTable& t, uint32_t top) {
  const float amax = as_float(top << 16), least = 1e-4F;
  float s;
  int64_t row = top & 127;
  if constexpr (kKind == Fp8Scale::act_fp32 || kKind == Fp8Scale::act_ue8m0) {
    if (!(amax > least)) row = Fp8CodeTable::kLeastAct;
    s = (amax > least ? amax : least) / 448.0F;
  } else {
    s = amax / 448.0F;
    if (!(s > least)) row = Fp8CodeTable::kLeastRecord;
    s = s > least ? s : least;
  }
  if constexpr (kKind == Fp8Scale::act_ue8m0 || kKind == Fp8Scale::record_pow2)
    return {ceil_pow2(s), t.plane[Fp8CodeTable::kPowerOfTwo][0]};
  return {s, t.plane[row][0]};
}

// Largest 16-bit word: twice the largest magnitude's bits.
inline uint32_t largest(__m512i v) {
  const __m256i a = _mm256_max_epu16(_mm512_castsi512_si256(v), _mm512_extracti64x4_epi64(v, 1));
  const __m128i b = _mm_max_epu16(_mm256_castsi256_si128(a), _mm256_extracti128_si256(a, 1));
  // The one reduction of words that there is gives the least.
  const __m128i least = _mm_minpos_epu16(_mm_xor_si128(b, _mm_set1_epi16(-1)));
  return static_cast<uint32_t>(_mm_cvtsi128_si32(least) & 0xffff) ^ 0xffffu;
}
inline __m512i twice(__m512i x) { return _mm512_add_epi16(x, x); }  // without the sign

struct Encoder {
  __m512i low, high, normal0, normal1, below, last_special;
  const uint8_t* planes;

  explicit Encoder(const Scale& s) : planes(s.planes) {
    const uint32_t es = as_bits(s.value) >> 23;
    below = _mm512_set1_epi8(static_cast<char>(es - 11));
    last_special = _mm512_set1_epi8(Fp8CodeTable::kPlanes - 1);
    normal0 = _mm512_load_si512(planes);
    normal1 = _mm512_load_si512(planes + 64);
    alignas(64) static constexpr uint8_t kEven[64] = {
        0,  2,  4,   6,   8,   10,  12,  14,  16,  18,  20,  22,  24,  26,  28,  30,
        32, 34, 36,  38,  40,  42,  44,  46,  48,  50,  52,  54,  56,  58,  60,  62,
        64, 66, 68,  70,  72,  74,  76,  78,  80,  82,  84,  86,  88,  90,  92,  94,
        96, 98, 100, 102, 104, 106, 108, 110, 112, 114, 116, 118, 120, 122, 124, 126};
    low = _mm512_load_si512(kEven);
    high = _mm512_or_si512(low, _mm512_set1_epi8(1));
  }
  // Values whose codes may be subnormal: a look-up in each of their binades' planes. Rare (a few blocks in a hundred).
  [[gnu::noinline]] static __m512i with_special(const uint8_t* planes, __m512i magnitude, __m512i e,
                                                __m512i index) {
    for (int k = 1; k < Fp8CodeTable::kPlanes; ++k) {
      const __mmask64 here = _mm512_cmpeq_epi8_mask(e, _mm512_set1_epi8(static_cast<char>(k)));
      magnitude =
          _mm512_mask_mov_epi8(magnitude, here,
                               _mm512_permutex2var_epi8(_mm512_load_si512(planes + 128 * k), index,
                                                        _mm512_load_si512(planes + 128 * k + 64)));
    }
    return magnitude;
  }
  // 64 values of two vectors.
  inline __m512i codes(__m512i x0, __m512i x1) const {
    const __m512i index =
        _mm512_permutex2var_epi8(x0, low, x1);  // significand (its bit 7 is ignored)
    const __m512i sign = _mm512_permutex2var_epi8(x0, high, x1);
    const __m512i e = _mm512_subs_epu8(_mm512_permutex2var_epi8(twice(x0), high, twice(x1)), below);
    const __mmask64 is_normal = _mm512_cmpgt_epu8_mask(e, last_special);
    const __mmask64 not_zero = _mm512_test_epi8_mask(e, e);
    // No exponent exceeds 31, so the shift stays in its byte.
    __m512i m = _mm512_add_epi8(_mm512_slli_epi16(e, 3),
                                _mm512_maskz_permutex2var_epi8(is_normal, normal0, index, normal1));
    if (__builtin_expect(is_normal != not_zero, 0)) m = with_special(planes, m, e, index);
    return _mm512_ternarylogic_epi64(m, sign, _mm512_set1_epi8(-128), 0xf8);  // m | (sign & 0x80)
  }
};

template <bool kStream>
inline void put(uint8_t* p, __m512i v) {
  if constexpr (kStream)
    _mm512_stream_si512(reinterpret_cast<__m512i*>(p), v);
  else
    _mm512_storeu_si512(p, v);
}
template <bool kStream>
inline void encode_block(const Encoder& encoder, const uint16_t* x, uint8_t* codes) {
  for (int64_t i = 0; i < kBlock; i += 64)
    put<kStream>(codes + i,
                 encoder.codes(_mm512_loadu_si512(x + i), _mm512_loadu_si512(x + i + 32)));
}

template <Fp8Scale kKind, bool kStream>
int64_t quantise(const Fp8CodeTable& t, const uint16_t* x, int64_t blocks, uint8_t* codes,
                 float* scales, bool want_more) {
  for (int64_t b0 = 0; b0 < blocks; b0 += kGroup) {
    const int64_t n = blocks - b0 < kGroup ? blocks - b0 : kGroup;
    const uint16_t* from = x + b0 * kBlock;
    Scale s[kGroup];
    int64_t good = n;
    for (int64_t b = 0; b < n; ++b) {
      const uint16_t* p = from + b * kBlock;
      __m512i m0 = twice(_mm512_loadu_si512(p)), m1 = twice(_mm512_loadu_si512(p + 32));
      m0 = _mm512_max_epu16(m0, twice(_mm512_loadu_si512(p + 64)));
      m1 = _mm512_max_epu16(m1, twice(_mm512_loadu_si512(p + 96)));
      const uint32_t top = largest(_mm512_max_epu16(m0, m1)) >> 1;
      if (top >= kInfinity && b < good) good = b;
      s[b] = scale_of<kKind>(t, top);
    }
    for (int64_t b = 0; b < good; ++b) {
      const char* ask = reinterpret_cast<const char*>(from + b * kBlock) + kAhead;
      if (want_more)
        for (int64_t i = 0; i < 256; i += 64) _mm_prefetch(ask + i, _MM_HINT_T0);
      scales[b0 + b] = s[b].value;
      encode_block<kStream>(Encoder(s[b]), from + b * kBlock, codes + (b0 + b) * kBlock);
    }
    if (good < n) return b0 + good;
  }
  return blocks;
}

template <Fp8Scale kKind>
int64_t quantise(const Fp8CodeTable& t, bool stream, const uint16_t* x, int64_t blocks,
                 uint8_t* codes, float* scales, bool ask) {
  return stream ? quantise<kKind, true>(t, x, blocks, codes, scales, ask)
                : quantise<kKind, false>(t, x, blocks, codes, scales, ask);
}

template <bool kStream>
uint32_t weights(const Fp8CodeTable& t, const uint16_t* x, int64_t stride, int64_t rows,
                 int64_t blocks, uint8_t* codes, float* scales) {
  __m512i most[kFp8WeightBlocks];
  for (auto& m : most) m = _mm512_setzero_si512();
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t b = 0; b < blocks; ++b) {
      const uint16_t* p = x + r * stride + b * kBlock;
      const __m512i m0 =
          _mm512_max_epu16(twice(_mm512_loadu_si512(p)), twice(_mm512_loadu_si512(p + 32)));
      const __m512i m1 =
          _mm512_max_epu16(twice(_mm512_loadu_si512(p + 64)), twice(_mm512_loadu_si512(p + 96)));
      most[b] = _mm512_max_epu16(most[b], _mm512_max_epu16(m0, m1));
    }
  uint32_t undone = 0;
  Scale s[kFp8WeightBlocks];
  for (int64_t b = 0; b < blocks; ++b) {
    const uint32_t top = largest(most[b]) >> 1;
    const float amax = as_float(top << 16), v = amax / 448.0F;
    s[b] = top == 0 ? Scale{1.0F, t.plane[Fp8CodeTable::kPowerOfTwo][0]}
                    : Scale{v, t.plane[top & 127][0]};
    if (top >= kInfinity || (top != 0 && !(v >= 0x1p-80F && v <= 0x1p100F))) undone |= 1u << b;
    if ((undone >> b & 1u) == 0) scales[b] = s[b].value;
  }
  // Whole rows of the group: longer pieces of memory than one block's 256 bytes.
  if (undone == 0 && blocks == kFp8WeightBlocks) {
    const Encoder e[kFp8WeightBlocks] = {Encoder(s[0]), Encoder(s[1]), Encoder(s[2]),
                                         Encoder(s[3])};
    for (int64_t r = 0; r < rows; ++r) {
      const uint16_t* p = x + r * stride;
      const char* ask = reinterpret_cast<const char*>(p + kFp8WeightBlocks * kBlock);
      for (int64_t b = 0; b < kFp8WeightBlocks; ++b) {
        for (int64_t i = 0; i < 256; i += 64) _mm_prefetch(ask + 256 * b + i, _MM_HINT_T1);
        encode_block<kStream>(e[b], p + b * kBlock, codes + r * stride + b * kBlock);
      }
    }
    return 0;
  }
  for (int64_t b = 0; b < blocks; ++b) {
    if ((undone >> b & 1u) != 0) continue;
    const Encoder encoder(s[b]);
    for (int64_t r = 0; r < rows; ++r)
      encode_block<kStream>(encoder, x + r * stride + b * kBlock, codes + r * stride + b * kBlock);
  }
  return undone;
}

}  // namespace

int64_t fp8_quantise_blocks_cpu_avx512bf16(const Fp8CodeTable& table, Fp8Scale kind, bool stream,
                                           const uint16_t* x, int64_t blocks, uint8_t* codes,
                                           float* scales, bool ask) noexcept {
  switch (kind) {
    case Fp8Scale::act_fp32:
      return quantise<Fp8Scale::act_fp32>(table, stream, x, blocks, codes, scales, ask);
    case Fp8Scale::act_ue8m0:
      return quantise<Fp8Scale::act_ue8m0>(table, stream, x, blocks, codes, scales, ask);
    case Fp8Scale::record_free:
      return quantise<Fp8Scale::record_free>(table, stream, x, blocks, codes, scales, ask);
    case Fp8Scale::record_pow2:
      return quantise<Fp8Scale::record_pow2>(table, stream, x, blocks, codes, scales, ask);
  }
  return 0;
}

uint32_t fp8_quantise_weights_cpu_avx512bf16(const Fp8CodeTable& table, bool stream,
                                             const uint16_t* x, int64_t stride, int64_t rows,
                                             int64_t blocks, uint8_t* codes,
                                             float* scales) noexcept {
  return stream ? weights<true>(table, x, stride, rows, blocks, codes, scales)
                : weights<false>(table, x, stride, rows, blocks, codes, scales);
}

}  // namespace v3b::kern
