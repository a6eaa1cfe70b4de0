// Rows [0, s) of one sequence out of the paged latent cache, one warp a row, for expanded attention over a cached
// prefix. Bound by bytes: one cache row in, (d_c + d_r) e out.
#include "kernels/attention/attention_cuda.h"
#include "kernels/attention/latent_row.cuh"
#include "kernels/attention/warp_copy.cuh"
#include "kernels/core/cuda_device.cuh"

namespace v3b::kern {
namespace {

using namespace dev;

// Blocks an SM: without a wish ptxas aims at 16 of them, 32 registers, and spills; 8 are enough for a copy.
constexpr int kThreads = 128, kRows = kThreads / 32, kBlocks = 8;

template <class T>
__global__ void __launch_bounds__(kThreads, kBlocks)
    mla_cache_gather_kernel(spec::MlaCacheGatherArgs a) {
  const int64_t j = static_cast<int64_t>(blockIdx.x) * kRows + warp_id();
  if (j >= a.s) return;
  const auto place = static_cast<uint32_t>(j), page = static_cast<uint32_t>(a.page);
  const int64_t slot = a.block_table[place / page] * a.page + place % page, d = a.d_c + a.d_r;
  const uint8_t* row = static_cast<const uint8_t*>(a.cache) +
                       slot * spec::mla_cache_row_bytes(a.kv_format, a.dtype, a.d_c, a.d_r);
  T* out = static_cast<T*>(a.out) + j * d;
  if (a.kv_format == spec::KvFormat::bf16) {
    warp_copy(out, row, d * static_cast<int64_t>(sizeof(T)));
    return;
  }
  for (int64_t i = lane_id(); i < d; i += 32) out[i] = from_float<T>(record_element(row, i, a.d_c));
}

}  // namespace

void mla_cache_gather_cuda_simt(const spec::MlaCacheGatherArgs& a, CudaStream stream) {
  if (a.s <= 0) return;
  const LaunchConfig c{dim3(static_cast<unsigned>((a.s + kRows - 1) / kRows)), kThreads, 0, stream};
  if (a.dtype == spec::DType::bf16)
    launch(mla_cache_gather_kernel<spec::bf16>, c, a);
  else
    launch(mla_cache_gather_kernel<float>, c, a);
}

}  // namespace v3b::kern
