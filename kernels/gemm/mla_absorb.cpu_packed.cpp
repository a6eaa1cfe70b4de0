// The absorbed projections on packed weights: a head's product at a time, each thread its own run of heads. A head of V3
// is 128 KiB of weights: 4 us of one core's memory, so its rows are packed by the thread that needs them.
#include <omp.h>

#include <algorithm>

#include "kernels/core/shares.h"
#include "kernels/core/team.h"
#include "kernels/gemm/packed_ops.h"

namespace v3b::kern {

PackedHeads::PackedHeads(const HeadsSource& s)
    : type_(s.type),
      heads_(s.heads),
      n_(s.n),
      k_(s.k),
      bytes_(packed_weight_bytes(s.type, s.n, s.k)),
      data_(s.heads * bytes_, false) {
  uint8_t* out = data_.data();
  const int64_t stride = s.stride * spec::dtype_bytes(s.type);
#pragma omp parallel
  {
    const int t = omp_get_thread_num(), parts = omp_get_num_threads();
    for (int64_t h = Shares::first(s.heads, t, parts); h < Shares::first(s.heads, t + 1, parts);
         ++h) {
      PackSource p;
      p.type = s.type, p.w = static_cast<const uint8_t*>(s.w) + h * stride;
      p.ld = s.ld, p.k_major = s.k_major, p.n = s.n, p.k = s.k;
      pack_weight(p, out + h * bytes_, 0, packed_groups(s.n));
    }
  }
}

void packed_heads(const HeadsArgs& a, const PackedHeads& w) noexcept {
  const PackedWeight first = w.heads() > 0 ? w.head(0) : PackedWeight{};
  const int64_t n = first.n, k = first.k;
  if (a.T == 0 || n == 0) return;
  const spec::DType type = first.type;
  const int64_t element = spec::dtype_bytes(type), groups = packed_groups(n);
  const double weights =
      static_cast<double>(w.heads()) * static_cast<double>(n) * static_cast<double>(k);
  const int threads =
      team_for(weights * static_cast<double>(element), 2 * weights * static_cast<double>(a.T));
  const auto head = [&](int64_t h) {
    thread_local Buffer<uint32_t> rows;
    rows.reserve_discard(packed_rows_dwords(type, a.T, k));
    RowsSource x;
    x.type = type, x.x = static_cast<const uint8_t*>(a.x) + h * a.head_x * element;
    x.ld = a.ld_x, x.m = a.T, x.k = k;
    pack_rows(type, x, rows.data(), 0, a.T);
    PackedRows p;
    p.m = a.T, p.k = k, p.data = rows.data();
    const PackedWeight matrix = w.head(h);
    const int64_t unit = packed_unit(matrix, a.T, 1);
    LinearOut out;
    out.c = static_cast<uint8_t*>(a.y) + h * a.head_y * element, out.ldc = a.ld_y;
    out.type = type;
    for (int64_t g = 0; g < groups; g += unit)
      packed_linear_part(matrix, p, g, std::min(groups, g + unit), out);
  };
  if (threads == 1) {
    for (int64_t h = 0; h < w.heads(); ++h) head(h);
    return;
  }
  Shares shares(w.heads(), threads);
#pragma omp parallel num_threads(threads)
  shares.run(omp_get_thread_num(), head);
}

void mla_absorb_cpu_packed(const spec::MlaAbsorbArgs& a, const PackedHeads& w) noexcept {
  packed_heads({a.T, a.x, a.n_h * a.k, a.k, a.y, a.n_h * a.n, a.n}, w);
}

}  // namespace v3b::kern
