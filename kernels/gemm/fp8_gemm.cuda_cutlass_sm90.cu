// Block-scaled FP8 product (SPEC 1.23) on Hopper through CUTLASS 4.2: TMA, wgmma, every 128 of k promoted with its scales
// (1x128 of A, 128x128 of B), two consumer warp groups on a 128x128x128 tile. Hardware only.
// Bound on H100: 2 m n k FLOPs at 1980 TFLOP/s, or m k + n k + 2 m n bytes at 3.35 TB/s.
#include <cuda_runtime.h>

#include "cutlass/cutlass.h"
#include "cutlass/detail/blockwise_scale_layout.hpp"
#include "cutlass/epilogue/collective/collective_builder.hpp"
#include "cutlass/gemm/collective/collective_builder.hpp"
#include "cutlass/gemm/device/gemm_universal_adapter.h"
#include "cutlass/gemm/kernel/gemm_universal.hpp"
#include "kernels/gemm/fp8_scales_cuda.h"
#include "kernels/gemm/gemm_libs_cuda.h"
#include "model/error.h"

namespace v3b::kern {
namespace {

using Element = cutlass::float_e4m3_t;
using Out = cutlass::bfloat16_t;
using Tile = cute::Shape<cute::_128, cute::_128, cute::_128>;
using Cluster = cute::Shape<cute::_1, cute::_2, cute::_1>;
using Row = cutlass::layout::RowMajor;
using Column = cutlass::layout::ColumnMajor;
using Scales =
    cutlass::detail::Sm90BlockwiseScaleConfig<1, 128, 128>;  // both with m or n innermost
using LayoutSA = decltype(Scales::deduce_layoutSFA());
using LayoutSB = decltype(Scales::deduce_layoutSFB());
using Schedule = cutlass::gemm::KernelTmaWarpSpecializedCooperativeFP8Blockwise;

using Epilogue = typename cutlass::epilogue::collective::CollectiveBuilder<
    cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, Tile, Cluster,
    cutlass::epilogue::collective::EpilogueTileAuto, float, float, void, Row, 8, Out, Row, 8,
    cutlass::epilogue::TmaWarpSpecializedCooperative>::CollectiveOp;
using Mainloop = typename cutlass::gemm::collective::CollectiveBuilder<
    cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, Element, cute::tuple<Row, LayoutSA>, 16,
    Element, cute::tuple<Column, LayoutSB>, 16, float, Tile, Cluster,
    cutlass::gemm::collective::StageCountAutoCarveout<static_cast<int>(
        sizeof(typename Epilogue::SharedStorage))>,
    Schedule>::CollectiveOp;
using Kernel =
    cutlass::gemm::kernel::GemmUniversal<cute::Shape<int, int, int, int>, Mainloop, Epilogue>;
using Gemm = cutlass::gemm::device::GemmUniversalAdapter<Kernel>;

int64_t padded(int64_t bytes) { return (bytes + 255) / 256 * 256; }
int64_t scale_bytes_a(const spec::Fp8GemmArgs& a) {
  return padded(a.m * spec::fp8_blocks(a.k) * 4);
}
int64_t scale_bytes_b(const spec::Fp8GemmArgs& a) {
  return padded(spec::fp8_blocks(a.n) * spec::fp8_blocks(a.k) * 4);
}

typename Gemm::Arguments arguments(const spec::Fp8GemmArgs& f, void* scratch) {
  const int m = static_cast<int>(f.m), n = static_cast<int>(f.n), k = static_cast<int>(f.k);
  typename Kernel::StrideA sa{};
  typename Kernel::StrideB sb{};
  typename Kernel::StrideD sd{};
  cute::get<0>(sa) = f.k, cute::get<0>(sb) = f.k, cute::get<0>(sd) = f.n;
  const auto shape = cute::make_shape(m, n, k, 1);
  char* base = static_cast<char*>(scratch);
  typename Gemm::Arguments a{};
  a.mode = cutlass::gemm::GemmUniversalMode::kGemm;
  a.problem_shape = {m, n, k, 1};
  a.mainloop.ptr_A = reinterpret_cast<const Element*>(f.qa), a.mainloop.dA = sa;
  a.mainloop.ptr_B = reinterpret_cast<const Element*>(f.qb), a.mainloop.dB = sb;
  a.mainloop.ptr_SFA = reinterpret_cast<const float*>(base);
  a.mainloop.layout_SFA = Scales::tile_atom_to_shape_SFA(shape);
  a.mainloop.ptr_SFB = reinterpret_cast<const float*>(base + scale_bytes_a(f));
  a.mainloop.layout_SFB = Scales::tile_atom_to_shape_SFB(shape);
  a.epilogue.thread.alpha = 1.0f, a.epilogue.thread.beta = 0.0f;
  a.epilogue.ptr_D = static_cast<Out*>(f.c), a.epilogue.dD = sd;
  return a;
}
void check(cutlass::Status s, const char* where) {
  if (s != cutlass::Status::kSuccess)
    throw Error(ExitCode::usage, cutlass::cutlassGetStatusString(s), where);
}

}  // namespace

int64_t fp8_gemm_cutlass_sm90_scratch_bytes(const spec::Fp8GemmArgs& a) {
  return scale_bytes_a(a) + scale_bytes_b(a) +
         static_cast<int64_t>(Gemm::get_workspace_size(arguments(a, nullptr)));
}
void fp8_gemm_cuda_cutlass_sm90(const spec::Fp8GemmArgs& f, void* scratch, CudaStream stream) {
  if (f.m == 0 || f.n == 0) return;
  char* base = static_cast<char*>(scratch);
  const int64_t kb = spec::fp8_blocks(f.k), nb = spec::fp8_blocks(f.n);
  fp8_scales_cuda_simt({f.m, f.m, nb, kb, f.sa, reinterpret_cast<float*>(base), f.sb,
                        reinterpret_cast<float*>(base + scale_bytes_a(f)), kb, true},
                       stream);
  const auto a = arguments(f, scratch);
  Gemm gemm;
  check(gemm.can_implement(a), "CUTLASS FP8 product");
  check(gemm.initialize(a, base + scale_bytes_a(f) + scale_bytes_b(f), stream),
        "CUTLASS FP8 product, start");
  check(gemm.run(stream), "CUTLASS FP8 product, launch");
}

}  // namespace v3b::kern
