// Expert products with bf16 activations on tensor cores (bf16 or E4M3 weights): see moe_ffn_mma.cuh for bounds.
#include "kernels/moe/moe_ffn_mma.cuh"

namespace v3b::kern {

using namespace moe_mma;

namespace {
using Tile16 = Tile<Mode::bf16, 64, 128, 64, 32, 64, 3>;
using Few16 = Skinny<Mode::bf16, 1, 2, 8>;
using TileW8 = Tile<Mode::w8, 64, 128, 128, 32, 32, 3>;
using FewW8 = Skinny<Mode::w8, 1, 2, 8>;

template <class T, class S>
void run(const MoeFfnArgs& a, CudaStream stream) {
  launch_product<true, T, S>(a, stream);
  launch_product<false, T, S>(a, stream);
}
}  // namespace

void moe_ffn_cuda_mma(const MoeFfnArgs& a, CudaStream stream) {
  if (tile_bound(a.groups, 1) == 0 || a.m == 0) return;
  if (a.w_type == spec::DType::bf16)
    run<Tile16, Few16>(a, stream);
  else
    run<TileW8, FewW8>(a, stream);
}

}  // namespace v3b::kern
