// Contiguous rows out of the paged latent cache, for expanded attention over a cached prefix.
#include <algorithm>

#include "kernels/attention/attention.h"
#include "kernels/attention/rows.h"
#include "kernels/core/team.h"

namespace v3b::kern {

void mla_cache_gather_cpu_simd(const spec::MlaCacheGatherArgs& a) noexcept {
  const int64_t row = (a.d_c + a.d_r) * spec::dtype_bytes(a.dtype);
  KeySource keys;
  keys.k1 = static_cast<const uint8_t*>(a.cache);
  keys.k1_stride = spec::mla_cache_row_bytes(a.kv_format, a.dtype, a.d_c, a.d_r);
  keys.record = a.kv_format != spec::KvFormat::bf16;
  keys.d1 = keys.record ? a.d_c : a.d_c + a.d_r;
  keys.d2 = keys.record ? a.d_r : 0;
  keys.table = a.block_table;
  keys.page = a.page;
  const int threads = team_for(2.0 * static_cast<double>(a.s) * static_cast<double>(row), 0);
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t j = 0; j < a.s; j += kKeyBlock)
    rows_fetch(keys, j, std::min(kKeyBlock, a.s - j), a.dtype,
               static_cast<uint8_t*>(a.out) + j * row, row);
}

}  // namespace v3b::kern
