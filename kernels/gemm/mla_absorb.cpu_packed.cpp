// The absorbed projections on packed weights: a head's product at a time, each thread its own run of heads. A head of V3
// is 128 KiB of weights: 4 us of one core's memory, so its rows are packed by the thread that needs them.
#include <omp.h>

#include <algorithm>

#include "kernels/core/shares.h"
#include "kernels/core/team.h"
#include "kernels/gemm/packed_ops.h"

namespace v3b::kern {

PackedHeads::PackedHeads(spec::DType type, int64_t heads, int64_t n, int64_t k, const void* w)
    : type_(type),
      heads_(heads),
      n_(n),
      k_(k),
      bytes_(packed_weight_bytes(type, n, k)),
      data_(heads * bytes_, false) {
  uint8_t* out = data_.data();
  const int64_t stride = n * k * spec::dtype_bytes(type);
#pragma omp parallel
  {
    const int t = omp_get_thread_num(), parts = omp_get_num_threads();
    for (int64_t h = Shares::first(heads, t, parts); h < Shares::first(heads, t + 1, parts); ++h) {
      PackSource s;
      s.type = type, s.w = static_cast<const uint8_t*>(w) + h * stride, s.ld = k, s.n = n, s.k = k;
      pack_weight(s, out + h * bytes_, 0, packed_groups(n));
    }
  }
}

void mla_absorb_cpu_packed(const spec::MlaAbsorbArgs& a, const PackedHeads& w) noexcept {
  if (a.T == 0 || a.n == 0 || a.n_h == 0) return;
  const int64_t element = spec::dtype_bytes(a.dtype), groups = packed_groups(a.n);
  const double weights =
      static_cast<double>(a.n_h) * static_cast<double>(a.n) * static_cast<double>(a.k);
  const int threads =
      team_for(weights * static_cast<double>(element), 2 * weights * static_cast<double>(a.T));
  const auto head = [&](int64_t h) {
    thread_local Buffer<uint32_t> rows;
    rows.reserve_discard(packed_rows_dwords(a.dtype, a.T, a.k));
    RowsSource x;
    x.type = a.dtype, x.x = static_cast<const uint8_t*>(a.x) + h * a.k * element;
    x.ld = a.n_h * a.k, x.m = a.T, x.k = a.k;
    pack_rows(a.dtype, x, rows.data(), 0, a.T);
    PackedRows p;
    p.m = a.T, p.k = a.k, p.data = rows.data();
    const PackedWeight matrix = w.head(h);
    const int64_t unit = packed_unit(matrix, a.T, 1);
    LinearOut out;
    out.c = static_cast<uint8_t*>(a.y) + h * a.n * element, out.ldc = a.n_h * a.n,
    out.type = a.dtype;
    for (int64_t g = 0; g < groups; g += unit)
      packed_linear_part(matrix, p, g, std::min(groups, g + unit), out);
  };
  if (threads == 1) {
    for (int64_t h = 0; h < a.n_h; ++h) head(h);
    return;
  }
  Shares shares(a.n_h, threads);
#pragma omp parallel num_threads(threads)
  shares.run(omp_get_thread_num(), head);
}

}  // namespace v3b::kern
