// Expert products with E4M3 activations and weights (SPEC 1.14, 1.23), capability 8.9 or later: see moe_ffn_mma.cuh.
#include "kernels/gemm/rows_cuda.h"
#include "kernels/moe/moe_ffn_mma.cuh"

namespace v3b::kern {

using namespace moe_mma;

namespace {
using TileFp8 = Tile<Mode::fp8, 64, 128, 128, 32, 32, 4>;
using FewFp8 = Skinny<Mode::fp8, 1, 2, 8>;
}  // namespace

void moe_ffn_fp8_cuda_mma(const MoeFfnArgs& a, CudaStream stream) {
  const int64_t rows = tile_bound(a.groups, 1) == 0  ? 0
                       : a.groups.offsets == nullptr ? a.groups.E * a.groups.capacity
                                                     : a.groups.max_rows;
  if (rows == 0 || a.m == 0) return;
  launch_product<true, TileFp8, FewFp8>(a, stream);
  // Rows that no expert owns are quantised too; nobody reads their codes.
  fp8_quant_cuda_simt({rows, a.m, false, spec::ActScale::fp32, spec::DType::bf16, a.hidden,
                       a.hidden_codes, a.hidden_scale},
                      stream);
  launch_product<false, TileFp8, FewFp8>(a, stream);
}

}  // namespace v3b::kern
