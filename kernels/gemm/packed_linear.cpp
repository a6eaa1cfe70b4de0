#include "kernels/gemm/packed_linear.h"

#include <omp.h>

#include <algorithm>
#include <cstring>

#include "kernels/core/cpu.h"
#include "kernels/core/shares.h"
#include "kernels/core/team.h"
#include "kernels/gemm/gemm.h"

namespace v3b::kern {
namespace {

using spec::DType;

constexpr int64_t kUnitBytes = 512 << 10;  // of weights
constexpr int64_t kSumsBytes = 192 << 10;  // of a unit's sums, in L2
constexpr int64_t kRowBlock = 512;         // rows of activations in a unit
constexpr int64_t kTileGroups = 3;         // that the kernels take at a time
constexpr int64_t kEarlyPack = 64 << 10;   // elements: packed before the team wakes
constexpr int64_t kUnitsPerThread = 4;

struct Scratch {
  Buffer<uint32_t> rows;
  Buffer<float> sums;
};
Scratch& scratch() {
  thread_local Scratch s;
  return s;
}

}  // namespace

PackedMatrix::PackedMatrix(const PackSource& s, const float* scale)
    : type_(s.type),
      n_(s.n),
      k_(s.k),
      scale_(scale),
      data_(packed_weight_bytes(s.type, s.n, s.k), false) {
  const int64_t groups = packed_groups(n_);
  const int threads = team_for(4 * static_cast<double>(data_.size()), 0);
  uint8_t* out = data_.data();
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    const int t = omp_get_thread_num(), parts = omp_get_num_threads();
    const int64_t g0 = Shares::first(groups, t, parts), g1 = Shares::first(groups, t + 1, parts);
    if (g0 < g1) pack_weight(s, out, g0, g1);
  }
}

void packed_store(const float* from, int64_t ld, int64_t rows, int64_t n,
                  const LinearOut& out) noexcept {
  for (int64_t i = 0; i < rows; ++i, from += ld) {
    if (out.type == DType::bf16) {
      convert_row_f32_to_bf16(from, static_cast<spec::bf16*>(out.c) + i * out.ldc, n);
      continue;
    }
    float* c = static_cast<float*>(out.c) + i * out.ldc;
    if (out.add) {
      for (int64_t j = 0; j < n; ++j) c[j] += from[j];
    } else {
      std::memcpy(c, from, static_cast<size_t>(n) * 4);
    }
  }
}

void packed_linear_part(const PackedWeight& w, const PackedRows& x, int64_t g0, int64_t g1,
                        const LinearOut& out) noexcept {
  const int64_t n0 = g0 * 16, n = std::min(w.n, g1 * 16) - n0, ld = (g1 - g0) * 16;
  LinearOut here = out;
  here.c = static_cast<uint8_t*>(out.c) + n0 * spec::dtype_bytes(out.type);
  if (out.type == DType::f32 && n == ld)
    return packed_product(w, x, g0, g1, static_cast<float*>(here.c), out.ldc, out.add);
  Buffer<float>& sums = scratch().sums;
  sums.reserve_discard(x.m * ld);
  packed_product(w, x, g0, g1, sums.data(), ld, false);
  packed_store(sums.data(), ld, x.m, n, here);
}

int64_t packed_unit(const PackedWeight& w, int64_t m, int parts) noexcept {
  const int64_t groups = packed_groups(w.n), rows = std::min(m, kRowBlock);
  const int64_t by_bytes = kUnitBytes / std::max<int64_t>(1, packed_group_bytes(w.type, w.k));
  const int64_t by_sums = kSumsBytes / (rows * 64),
                by_parts = groups / (kUnitsPerThread * std::max(1, parts));
  const int64_t most = std::min({std::max(by_bytes, kTileGroups), by_sums, by_parts});
  return std::max<int64_t>(1, most / kTileGroups) * kTileGroups;
}

void packed_linear(const PackedWeight& w, const RowsSource& x, const LinearOut& out,
                   const float* x_scale) noexcept {
  if (x.m == 0 || w.n == 0) return;
  if (w.k == 0) {
    const auto size = static_cast<size_t>(w.n * spec::dtype_bytes(out.type));
    for (int64_t i = 0; i < x.m && !out.add; ++i)
      std::memset(static_cast<uint8_t*>(out.c) + i * out.ldc * spec::dtype_bytes(out.type), 0,
                  size);
    return;
  }
  const double weights = static_cast<double>(w.n) * static_cast<double>(w.k);
  const int threads = team_for(weights * static_cast<double>(spec::dtype_bytes(w.type)),
                               2 * weights * static_cast<double>(x.m));
  Buffer<uint32_t>& rows = scratch().rows;
  rows.reserve_discard(packed_rows_dwords(w.type, x.m, w.k));
  uint32_t* packed = rows.data();
  const int64_t groups = packed_groups(w.n), row_dwords = packed_rows_dwords(w.type, 1, w.k);
  const int64_t scale_ld = (w.k + 127) / 128;
  const auto block = [&](int64_t r0) {
    PackedRows p;
    p.m = std::min(kRowBlock, x.m - r0), p.k = w.k, p.data = packed + r0 * row_dwords;
    if (x_scale != nullptr) p.scale = x_scale + r0 * scale_ld, p.scale_ld = scale_ld;
    return p;
  };
  const auto from_row = [&](int64_t r0) {
    LinearOut o = out;
    o.c = static_cast<uint8_t*>(out.c) + r0 * out.ldc * spec::dtype_bytes(out.type);
    return o;
  };
  if (threads == 1) {
    pack_rows(w.type, x, packed, 0, x.m);
    const int64_t size = packed_unit(w, x.m, 1);
    for (int64_t r0 = 0; r0 < x.m; r0 += kRowBlock)
      for (int64_t g = 0; g < groups; g += size)
        packed_linear_part(w, block(r0), g, std::min(groups, g + size), from_row(r0));
    return;
  }
  const bool early = x.m * x.k <= kEarlyPack;
  if (early) pack_rows(w.type, x, packed, 0, x.m);
  const int64_t chunk = packed_rows_chunk(), chunks = (x.m + chunk - 1) / chunk;
  const int64_t size = packed_unit(w, x.m, threads), units = (groups + size - 1) / size;
  const int64_t blocks = (x.m + kRowBlock - 1) / kRowBlock;
  Shares shares(units * blocks, threads);  // the row blocks of a unit one after the other
#pragma omp parallel num_threads(threads)
  {
    if (!early)
#pragma omp for schedule(static)
      for (int64_t i = 0; i < chunks; ++i)
        pack_rows(w.type, x, packed, i * chunk, std::min(x.m, (i + 1) * chunk));
    shares.run(omp_get_thread_num(), [&](int64_t i) {
      const int64_t g = i / blocks * size, r0 = i % blocks * kRowBlock;
      packed_linear_part(w, block(r0), g, std::min(groups, g + size), from_row(r0));
    });
  }
}

}  // namespace v3b::kern
