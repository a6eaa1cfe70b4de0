// Layouts of packed_weight.h, and which level's product runs.
#include "kernels/gemm/packed_weight.h"

#include <algorithm>
#include <cstring>

#include "kernels/core/amx.h"
#include "kernels/core/cpu.h"
#include "kernels/gemm/fp8.h"
#include "kernels/gemm/tile.h"

namespace v3b::kern {
namespace {

using spec::DType;

constexpr int64_t kChunk = 8;
constexpr int64_t kPiece = 128;  // of a row widened at a time

bool pairs(DType w) { return w != DType::f32 && fp8_gemm_avx512bf16_supported(); }
bool amx() { return cpu_features().amx_bf16; }

const uint8_t* at(const void* p, int64_t elements, DType t) {
  return static_cast<const uint8_t*>(p) + elements * spec::dtype_bytes(t);
}

// One element a time: any source, any level.
template <class T>
void pack_group(const PackSource& s, T* out, int64_t g) {
  const auto* src = static_cast<const T*>(s.w);
  const int64_t depth = packed_depth(s.type, s.k), per_dword = 4 / static_cast<int64_t>(sizeof(T));
  const int64_t valid = std::min<int64_t>(16, s.n - g * 16);
  std::memset(out, 0, static_cast<size_t>(depth) * 16 * sizeof(T));
  for (int64_t i = 0; i < valid; ++i) {
    const T* row = src + (g * 16 + i) * (s.k_major ? 1 : s.ld);
    const int64_t step = s.k_major ? s.ld : 1;
    for (int64_t k = 0; k < s.k; ++k)
      out[(k / per_dword * 16 + i) * per_dword + k % per_dword] = row[k * step];
  }
}

// Four outputs a 16 bytes: their first two codes, then the other two, nibbles exchanged; marks [blocks of 128].
void pack_codes(const PackSource& s, uint8_t* out, uint8_t* marks, int64_t g) {
  const auto* src = static_cast<const uint8_t*>(s.w);
  const int64_t depth = packed_depth(s.type, s.k), blocks = (s.k + 127) / 128;
  const int64_t valid = std::min<int64_t>(16, s.n - g * 16);
  std::memset(out, 0, static_cast<size_t>(depth) * 16);
  std::memset(marks, valid < 16 ? 1 : 0, static_cast<size_t>(blocks));
  if (depth % 128 != 0 || depth != s.k) marks[blocks - 1] = 1;
  for (int64_t i = 0; i < valid; ++i) {
    const uint8_t* row = src + (g * 16 + i) * s.ld;
    for (int64_t k = 0; k < s.k; ++k) {
      const uint32_t c = row[k];
      if ((c & 0x78u) == 0 || (c & 0x7fu) == 0x7fu) marks[k / 128] = 1;
      out[k / 4 * 64 + i / 4 * 16 + k / 2 % 2 * 8 + i % 4 * 2 + k % 2] =
          static_cast<uint8_t>(c << 4 | c >> 4);
    }
  }
}

void rows_to_floats(const RowsSource& s, int64_t depth, float* out, int64_t r0, int64_t r1) {
  alignas(64) float piece[kPiece];
  for (int64_t first = r0; first < r1; first += kChunk) {
    const int64_t rows = std::min(kChunk, r1 - first);
    float* chunk = out + first * depth;
    for (int64_t i = 0; i < rows; ++i) {
      const int64_t row = s.index != nullptr ? s.index[first + i] : first + i;
      const uint8_t* from = at(s.x, row * s.ld, s.type);
      if (rows == 1) {
        tile_widen_cpu_simd(from, s.type, s.k, chunk);
        std::fill(chunk + s.k, chunk + depth, 0.0F);
        continue;
      }
      for (int64_t k = 0; k < depth; k += kPiece) {
        const int64_t wanted = std::min(kPiece, depth - k),
                      n = std::clamp<int64_t>(s.k - k, 0, wanted);
        if (n > 0) tile_widen_cpu_simd(from + k * spec::dtype_bytes(s.type), s.type, n, piece);
        std::fill(piece + n, piece + wanted, 0.0F);
        for (int64_t j = 0; j < wanted; ++j) chunk[(k + j) * rows + i] = piece[j];
      }
    }
  }
}

}  // namespace

void pack_weight(const PackSource& s, void* out, int64_t g0, int64_t g1) noexcept {
  if (s.k == 0) return;  // no bytes, and perhaps no memory
  const int64_t bytes = packed_group_bytes(s.type, s.k);
  auto* to = static_cast<uint8_t*>(out);
  const int64_t blocks = (s.k + 127) / 128;
  uint8_t* marks = to + packed_groups(s.n) * bytes;
  if (pairs(s.type)) {
    if (s.type == DType::f8e4m3) return packed_codes_cpu_avx512bf16(s, to, marks, g0, g1);
    PackArgs a;
    a.src = at(s.w, g0 * 16 * (s.k_major ? 1 : s.ld), s.type);
    a.type = s.type, a.ld = s.ld, a.k_major = s.k_major;
    a.count = std::min(s.n, g1 * 16) - g0 * 16, a.k = s.k;
    a.out = reinterpret_cast<uint32_t*>(to + g0 * bytes), a.out_group = bytes / 4;
    return tile_pack_lanes_cpu_avx512bf16(a);
  }
  for (int64_t g = g0; g < g1; ++g) {
    void* group = to + g * bytes;
    if (s.type == DType::f8e4m3) {
      pack_codes(s, static_cast<uint8_t*>(group), marks + g * blocks, g);
    } else if (s.type == DType::bf16) {
      pack_group(s, static_cast<spec::bf16*>(group), g);
    } else {
      pack_group(s, static_cast<float*>(group), g);
    }
  }
}

int64_t packed_rows_dwords(DType w, int64_t m, int64_t k) noexcept {
  return m * packed_depth(w, k) / (pairs(w) ? 2 : 1);
}

int64_t packed_rows_chunk() noexcept { return 2 * kChunk; }  // of AMX; of all others 8

void pack_rows(DType w, const RowsSource& s, uint32_t* out, int64_t r0, int64_t r1) noexcept {
  if (pairs(w)) return packed_rows_cpu_avx512bf16(s, amx(), out, r0, r1);
  rows_to_floats(s, packed_depth(w, s.k), reinterpret_cast<float*>(out), r0, r1);
}

void packed_product(const PackedWeight& w, const PackedRows& x, int64_t g0, int64_t g1, float* c,
                    int64_t ldc, bool add) noexcept {
  if (!pairs(w.type)) return packed_product_cpu_simd(w, x, g0, g1, c, ldc, add);
  if (amx()) return V3B_AMX_CALL(packed_product_cpu_amx)(w, x, g0, g1, c, ldc, add);
  packed_product_cpu_avx512bf16(w, x, g0, g1, c, ldc, add);
}

const char* packed_isa(DType, DType w) noexcept {
  if (!pairs(w)) return packed_product_simd_isa();
  if (amx()) return isa_name(best_isa());
  return w == DType::f8e4m3 ? "avx512_bf16+vbmi" : "avx512_bf16";
}

}  // namespace v3b::kern
