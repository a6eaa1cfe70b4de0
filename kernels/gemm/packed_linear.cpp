#include "kernels/gemm/packed_linear.h"

#include <omp.h>

#include <algorithm>
#include <cstring>

#include "kernels/core/cpu.h"
#include "kernels/core/shares.h"
#include "kernels/core/spin_barrier.h"
#include "kernels/core/team.h"
#include "kernels/gemm/fp8.h"
#include "kernels/gemm/gemm.h"
#include "kernels/gemm/packed_many.h"

namespace v3b::kern {
namespace {

using spec::DType;

constexpr int64_t kUnitBytes = 512 << 10;  // of weights
constexpr int64_t kSumsBytes = 192 << 10;  // of a unit's sums, in L2
constexpr int64_t kRowBlock = 512;         // rows of activations in a unit
constexpr int64_t kTileGroups = 3;         // that the kernels take at a time
constexpr int64_t kEarlyPack = 64 << 10;   // elements: packed before the team wakes
constexpr int64_t kUnitsPerThread = 4;
constexpr int64_t kManyRows = 17;          // from so many rows on packed_many.h
constexpr int64_t kManyBytes = 448 << 10;  // of weights of such a unit, in L2
constexpr int64_t kOwnBytes = 16 << 20;    // up to such a weight units may be rows instead
constexpr int64_t kPanelGroups =
    12;                             // against so many groups at a time, 384 KiB of weights a chain
constexpr int64_t kPanelMost = 16;  // or all of them
constexpr int64_t kOwnRows = 32;    // of such a unit at least

void narrow(const float* from, uint16_t* to, int64_t n) {
  if (cpu_features().avx512) return packed_narrow_cpu_avx512(from, to, n);
  convert_row_f32_to_bf16(from, reinterpret_cast<spec::bf16*>(to), n);
}

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
      narrow(from, static_cast<uint16_t*>(out.c) + i * out.ldc, n);
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

bool packed_many_takes(const PackedWeight& w, int64_t m) noexcept {
  return m >= kManyRows && w.type == DType::bf16 && fp8_gemm_avx512bf16_supported() &&
         !cpu_features().amx_bf16;
}

int64_t packed_panels(int64_t k, int64_t groups) noexcept {
  if (groups <= kPanelMost) return 1;
  const int64_t size = std::max(kPanelGroups, kManyBytes / packed_group_bytes(DType::bf16, k));
  return (groups + size - 1) / size;
}

namespace {

// `source`: rows that are yet to be packed into x (its memory is this thread's own then).
void many_part(const PackedWeight& w, const PackedRows& x, const RowsSource* source, bool keep,
               int64_t g0, int64_t g1, const LinearOut& out) {
  Buffer<float>& kept = scratch().sums;
  kept.reserve_discard(packed_many_sums(x.m, g1 - g0));
  PackedMany p;
  p.w = static_cast<const uint32_t*>(w.data), p.m = x.m, p.k = w.k, p.n = w.n;
  p.x = const_cast<uint32_t*>(x.data), p.source = source, p.keep = keep;
  p.g0 = g0, p.g1 = g1, p.c = out.c, p.ldc = out.ldc, p.type = out.type, p.add = out.add;
  p.sums = kept.data();
  packed_many_cpu_avx512bf16(p);
}

}  // namespace

void packed_many_part(const PackedWeight& w, const PackedRows& x, int64_t g0, int64_t g1,
                      const LinearOut& out) noexcept {
  many_part(w, x, nullptr, true, g0, g1, out);
}

void packed_linear_part(const PackedWeight& w, const PackedRows& x, int64_t g0, int64_t g1,
                        const LinearOut& out) noexcept {
  const int64_t n0 = g0 * 16, n = std::min(w.n, g1 * 16) - n0, ld = (g1 - g0) * 16;
  LinearOut here = out;
  here.c = static_cast<uint8_t*>(out.c) + n0 * spec::dtype_bytes(out.type);
  if (packed_many_takes(w, x.m)) return many_part(w, x, nullptr, true, g0, g1, out);
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

// How the groups are cut for a team.
struct Units {
  int64_t groups, count, size = 0;  // size 0: as equal as can be
  Units(const PackedWeight& w, int64_t m, int threads) : groups(packed_groups(w.n)) {
    if (!packed_many_takes(w, m)) {
      size = packed_unit(w, m, threads), count = (groups + size - 1) / size;
      return;
    }
    const int64_t by_bytes = kManyBytes / packed_group_bytes(w.type, w.k),
                  by_parts = groups / (kUnitsPerThread * threads);
    size = std::max<int64_t>(1, std::min(by_bytes, by_parts) / kTileGroups) * kTileGroups;
    count = (groups + size - 1) / size;
    if (count >= 2 * kUnitsPerThread * threads) return;
    count = std::min(groups, (count + threads - 1) / threads * threads), size = 0;
  }
  int64_t first(int64_t i) const {
    return size > 0 ? std::min(groups, i * size) : groups * i / count;
  }
};

bool own_rows(const PackedWeight& w, const RowsSource& x, int threads) {
  return packed_many_takes(w, x.m) && x.type == DType::bf16 && x.index == nullptr &&
         packed_groups(w.n) * packed_group_bytes(w.type, w.k) <= kOwnBytes &&
         x.m >= kOwnRows * 2 * threads;
}

// A small weight against many rows: units are rows, packed by the thread that uses them, so nobody waits.
void by_rows(const PackedWeight& w, const RowsSource& x, const LinearOut& out, int threads) {
  const int64_t parts = kUnitsPerThread * threads,
                least = std::max(kOwnRows, (x.m + parts - 1) / parts);
  const int64_t size = std::min(kRowBlock, (least + 15) / 16 * 16), units = (x.m + size - 1) / size;
  const int64_t groups = packed_groups(w.n), row_dwords = packed_rows_dwords(w.type, 1, w.k);
  const int64_t panels = packed_panels(w.k, groups);
  Shares shares(units, threads);
#pragma omp parallel num_threads(threads) if (threads > 1)
  shares.run(omp_get_thread_num(), [&](int64_t i) {
    RowsSource source = x;
    const int64_t r0 = i * size;
    source.m = std::min(size, x.m - r0);
    source.x = static_cast<const uint8_t*>(x.x) + r0 * x.ld * 2;
    LinearOut to = out;
    to.c = static_cast<uint8_t*>(out.c) + r0 * out.ldc * spec::dtype_bytes(out.type);
    Buffer<uint32_t>& rows = scratch().rows;
    rows.reserve_discard(source.m * row_dwords);
    PackedRows p;
    p.m = source.m, p.k = w.k, p.data = rows.data();
    for (int64_t j = 0; j < panels; ++j)
      many_part(w, p, j == 0 ? &source : nullptr, panels > 1, groups * j / panels,
                groups * (j + 1) / panels, to);
  });
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
  if (own_rows(w, x, threads)) return by_rows(w, x, out, threads);
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
  const Units units(w, x.m, threads);
  const int64_t blocks = (x.m + kRowBlock - 1) / kRowBlock;
  Shares shares(units.count * blocks, threads);
  SpinBarrier packs;
#pragma omp parallel num_threads(threads)
  {
    const int t = omp_get_thread_num(), team = omp_get_num_threads();
    if (!early) {
      const int64_t c0 = Shares::first(chunks, t, team), c1 = Shares::first(chunks, t + 1, team);
      if (c0 < c1) pack_rows(w.type, x, packed, c0 * chunk, std::min(x.m, c1 * chunk));
      packs.wait(team);
    }
    shares.run(t, [&](int64_t i) {  // many rows: the weight passes once a block of rows
      const int64_t u = i % units.count, r0 = i / units.count * kRowBlock;
      packed_linear_part(w, block(r0), units.first(u), units.first(u + 1), from_row(r0));
    });
  }
}

}  // namespace v3b::kern
