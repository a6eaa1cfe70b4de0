// Rate of AMX tile products from registers only: four accumulator tiles, two tiles of A and two of
// B.
#include <immintrin.h>

#include <cstring>

#include "bench/harness/peaks_kernels.h"

namespace v3b::bench {
namespace {

constexpr int kUnroll = 4;

struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0;
  uint8_t reserved[14] = {};
  uint16_t bytes_per_row[16] = {};
  uint8_t rows[16] = {};
};
static_assert(sizeof(TileConfig) == 64);

// All eight tiles: 16 rows of 64 bytes. The operand is the whole struct, because GCC 12's intrinsic
// declares only 8 of the 64 bytes as read and drops the stores that fill it.
void configure() {
  TileConfig config;
  for (int i = 0; i < 8; ++i) config.bytes_per_row[i] = 64, config.rows[i] = 16;
  __asm__ volatile("ldtilecfg %0" ::"m"(config));
}

void load_operands(uint32_t pattern) {
  alignas(64) uint32_t block[16 * 16];
  for (auto& v : block) v = pattern;
  __asm__ volatile("" ::"r"(block) : "memory");
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  _tile_loadd(4, block, 64);
  _tile_loadd(5, block, 64);
  _tile_loadd(6, block, 64);
  _tile_loadd(7, block, 64);
}

}  // namespace

double rate_bf16_amx(int64_t rounds, double* sink) noexcept {
  configure();
  load_operands(0x3c003c00u);
  for (int64_t r = 0; r < rounds; ++r)
    for (int u = 0; u < kUnroll; ++u) {
      _tile_dpbf16ps(0, 4, 6);
      _tile_dpbf16ps(1, 4, 7);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
  alignas(64) float out[16 * 16] = {};
  _tile_stored(0, out, 64);
  __asm__ volatile("" ::"r"(out) : "memory");
  *sink += static_cast<double>(out[0]);
  _tile_release();
  return static_cast<double>(rounds) * kUnroll * 4 * 16 * 16 * 32 * 2;
}

double rate_int8_amx(int64_t rounds, double* sink) noexcept {
  configure();
  load_operands(0x01010101u);
  for (int64_t r = 0; r < rounds; ++r)
    for (int u = 0; u < kUnroll; ++u) {
      _tile_dpbssd(0, 4, 6);
      _tile_dpbssd(1, 4, 7);
      _tile_dpbssd(2, 5, 6);
      _tile_dpbssd(3, 5, 7);
    }
  alignas(64) int32_t out[16 * 16] = {};
  _tile_stored(0, out, 64);
  __asm__ volatile("" ::"r"(out) : "memory");
  *sink += static_cast<double>(out[0]);
  _tile_release();
  return static_cast<double>(rounds) * kUnroll * 4 * 16 * 16 * 64 * 2;
}

}  // namespace v3b::bench
