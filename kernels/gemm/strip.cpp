// Blocking around the tiles: K in blocks whose packed activations stay in L2, weight rows in strips that stay in L1.
#include "kernels/gemm/strip.h"

#include <algorithm>

#include "kernels/core/amx.h"
#include "kernels/core/buffer.h"
#include "kernels/core/cpu.h"
#include "kernels/gemm/fp8.h"

namespace v3b::kern {
namespace {

using spec::DType;

constexpr int64_t kBlockBytes =
    576 << 10;  // of packed activations in L2 at a time (1 MiB on Zen 4, 2 on SPR)
constexpr int64_t kRowsOfColumns = 96;  // packed from [K, N]: whole lines of it
constexpr int64_t kRows = 48;           // weight rows packed at a time: whole tiles of 6, 8 and 12
constexpr int64_t kDirectRows =
    24;                          // of a weight read as it lies, when several panels pass over them
constexpr int64_t kPanel = 4;    // groups of lanes that one pass of the tiles takes
constexpr int64_t kBlock = 128;  // of FP8 scales
// Of a chain of VDPBF16PS: its error grows with the length, not with its root (measured: 0.8 of the tolerance with K =
// 2048 in one chain, oneDNN 0.23).
constexpr int64_t kDepth = 1024;
constexpr int64_t kDepthPacked = 256;  // weight rows packed from [K, N]: 96 x 128 pairs, 48 KiB

struct Scratch {
  Buffer<uint32_t> rows, groups;
  Buffer<float> scale;
};
Scratch& scratch() {
  thread_local Scratch s;
  return s;
}

// Weight rows [n, n + rows) x K [k, k + depth) as the P of a tile, packed.
void pack_p(TileForm form, const StripW& w, int64_t n, int64_t rows, int64_t k, int64_t depth,
            TileArgs& t) {
  Scratch& s = scratch();
  const int64_t steps = tile_steps(form, depth), bytes = spec::dtype_bytes(w.type);
  PackArgs a;
  a.src = static_cast<const uint8_t*>(w.w) + (w.k_major ? k * w.ld + n : n * w.ld + k) * bytes;
  a.type = w.type, a.ld = w.ld, a.k_major = w.k_major, a.count = rows, a.k = depth;
  if (w.k_major && !tile_wants_rows()) {
    a.out_step = (rows + 15) / 16 * 16;
    s.rows.reserve_discard(steps * a.out_step);
    a.out = s.rows.data();
    tile_pack_rows(form, a);
    t.p = a.out, t.p_row = 1, t.p_step = a.out_step;
    return;
  }
  const int64_t ld = steps + 16;  // rows in different sets of L1
  s.rows.reserve_discard((rows + 15) / 16 * 16 * ld);
  if (w.k_major) {  // through lanes, then groups of 16 rows transposed
    a.out_group = steps * 16;
    s.groups.reserve_discard((rows + 15) / 16 * a.out_group);
    a.out = s.groups.data();
    tile_pack_lanes(form, a);
    for (int64_t g = 0; g * 16 < rows; ++g) {
      StoreArgs f;  // dwords pass through a float register unchanged
      f.from = reinterpret_cast<const float*>(a.out + g * a.out_group), f.ld_from = 16;
      f.rows = steps, f.lanes = 16;
      f.c = s.rows.data() + g * 16 * ld, f.ldc = ld;
      tile_store_transposed(f);
    }
  } else {
    a.out = s.rows.data(), a.out_step = ld;
    tile_pack_rows(form, a);
  }
  t.p = s.rows.data(), t.p_row = ld, t.p_step = 1;
}

// Whether the weight can be read as it lies.
bool direct(TileForm form, const StripW& w, int64_t depth) {
  if (w.k_major) return false;
  if (form == TileForm::f32) return w.type == DType::f32;
  return w.type == DType::bf16 && w.ld % 2 == 0 && depth % (tile_wants_rows() ? 32 : 2) == 0;
}

}  // namespace

TileForm tile_form(DType a, DType b) noexcept {
  const auto pairs = [](DType t) { return t == DType::bf16 || t == DType::f8e4m3; };
  return pairs(a) && pairs(b) && fp8_gemm_avx512bf16_supported() ? TileForm::pairs : TileForm::f32;
}
bool tile_wants_rows() noexcept { return cpu_features().amx_bf16; }

void tile_run(TileForm form, const TileArgs& t) noexcept {
  if (form == TileForm::f32) return tile_f32_cpu_simd(t);
  if (cpu_features().amx_bf16) return V3B_AMX_CALL(tile_cpu_amx)(t);
  tile_cpu_avx512bf16(t);
}
void tile_pack_lanes(TileForm form, const PackArgs& a) noexcept {
  if (form == TileForm::f32) return tile_pack_lanes_f32_cpu_simd(a);
  tile_pack_lanes_cpu_avx512bf16(a);
}
void tile_pack_rows(TileForm form, const PackArgs& a) noexcept {
  if (form == TileForm::f32) return tile_pack_rows_f32_cpu_simd(a);
  tile_pack_rows_cpu_avx512bf16(a);
}
void tile_store_transposed(const StoreArgs& a) noexcept {
  if (cpu_features().avx512) return tile_store_transposed_cpu_avx512(a);
  for (int64_t l = 0; l < a.lanes; ++l)
    for (int64_t r = 0; r < a.rows; ++r) {
      const float v = a.from[r * a.ld_from + l];
      const int64_t at = l * a.ldc + r;
      if (a.type == DType::bf16) {
        static_cast<spec::bf16*>(a.c)[at] = spec::to_bf16(v);
      } else {
        float& c = static_cast<float*>(a.c)[at];
        c = a.accumulate ? c + v : v;
      }
    }
}

int64_t strip_x_dwords(TileForm form, int64_t m, int64_t k) noexcept {
  return (m + 15) / 16 * tile_group(form, k);
}
void strip_pack_x(TileForm form, const PackArgs& x, int64_t g0, int64_t g1) noexcept {
  PackArgs a = x;
  a.out_group = tile_group(form, x.k), a.out_step = 16;
  a.out = x.out + g0 * a.out_group;
  a.count = std::min(x.count, g1 * 16) - g0 * 16;
  if (a.count <= 0) return;
  if (x.index != nullptr) {
    a.index = x.index + g0 * 16;
  } else {
    a.src = static_cast<const uint8_t*>(x.src) +
            g0 * 16 * (x.k_major ? 1 : x.ld) * spec::dtype_bytes(x.type);
  }
  tile_pack_lanes(form, a);
}
StripX strip_x(TileForm form, int64_t m, int64_t k, const uint32_t* packed) noexcept {
  return {form, m, k, packed, tile_group(form, k), nullptr};
}

void strip_lanes(const StripX& x, int64_t g0, int64_t g1, const StripW& w, int64_t n0, int64_t n1,
                 float* c, int64_t ldc, bool add) noexcept {
  const bool fp8 = w.type == DType::f8e4m3;
  const int64_t per_step = x.form == TileForm::pairs ? 2 : 1, groups = g1 - g0;
  const int64_t lanes = std::min(x.m, g1 * 16) - g0 * 16;
  int64_t depth = kBlock;  // of a block of K
  if (!fp8) {
    const int64_t limit =
        std::min(kDepth, std::max<int64_t>(128, kBlockBytes / (groups * 64)) * per_step);
    const int64_t most = w.k_major ? std::min(limit, kDepthPacked) : limit;
    const int64_t blocks = (x.k + most - 1) / most;
    depth = ((x.k + blocks - 1) / blocks + 127) / 128 * 128;
  }
  const int64_t scale_blocks = (x.k + kBlock - 1) / kBlock, padded = (x.m + 15) / 16 * 16;
  if (fp8) scratch().scale.reserve_discard(groups * 16);
  TileArgs t;
  t.lanes = lanes, t.q_group = x.q_group, t.ldc = ldc;
  for (int64_t k = 0; k < x.k; k += depth) {
    const int64_t d = std::min(depth, x.k - k);
    const bool as_it_lies = direct(x.form, w, d);
    t.q = x.q + g0 * x.q_group + k / per_step * 16;
    t.add = add || k > 0;
    // Whole padded steps for AMX; of floats read as they lie nothing lies past the row.
    t.steps = x.form == TileForm::pairs && tile_wants_rows() ? tile_steps(x.form, d)
                                                             : (d + per_step - 1) / per_step;
    for (int64_t n = n0; n < n1;) {
      int64_t rows = n1 - n;
      if (!as_it_lies) rows = std::min(rows, w.k_major ? kRowsOfColumns : kRows);
      if (as_it_lies && groups > kPanel) rows = std::min(rows, kDirectRows);
      if (fp8) {
        rows = std::min(rows, (n / kBlock + 1) * kBlock - n);
        const float sw = w.scale[n / kBlock * scale_blocks + k / kBlock];
        float* s = scratch().scale.data();
        const float* sx = x.scale == nullptr ? nullptr : x.scale + k / kBlock * padded + g0 * 16;
        for (int64_t i = 0; i < groups * 16; ++i) s[i] = sx == nullptr ? sw : sx[i] * sw;
        t.scale = s;
      }
      t.rows = rows;
      if (as_it_lies) {
        t.p = static_cast<const uint32_t*>(w.w) + (n * w.ld + k) / per_step;
        t.p_row = w.ld / per_step, t.p_step = 1;
      } else {
        pack_p(x.form, w, n, rows, k, d, t);
      }
      t.c = c + (n - n0) * ldc;
      tile_run(x.form, t);
      n += rows;
    }
  }
}

}  // namespace v3b::kern
