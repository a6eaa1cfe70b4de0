// bf16 product on Hopper through CUTLASS 4.2: TMA loads, wgmma, warp-specialised ping-pong, 128x128x64 tiles. Hardware only.
// Bound on H100: 2 m n k FLOPs at 990 TFLOP/s, or the bytes of the operands at 3.35 TB/s.
#include <cuda_runtime.h>

#include "cutlass/cutlass.h"
#include "cutlass/epilogue/collective/collective_builder.hpp"
#include "cutlass/gemm/collective/collective_builder.hpp"
#include "cutlass/gemm/device/gemm_universal_adapter.h"
#include "cutlass/gemm/kernel/gemm_universal.hpp"
#include "kernels/gemm/gemm_libs_cuda.h"
#include "model/error.h"

namespace v3b::kern {
namespace {

using Element = cutlass::bfloat16_t;
using Tile = cute::Shape<cute::_128, cute::_128, cute::_64>;
using Cluster =
    cute::Shape<cute::_1, cute::_2, cute::_1>;  // two column tiles share their rows of A
using Row = cutlass::layout::RowMajor;
using Column = cutlass::layout::ColumnMajor;
using Schedule = cutlass::gemm::KernelTmaWarpSpecializedPingpong;

using Epilogue = typename cutlass::epilogue::collective::CollectiveBuilder<
    cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, Tile, Cluster,
    cutlass::epilogue::collective::EpilogueTileAuto, float, float, void, Row, 8, Element, Row, 8,
    cutlass::epilogue::TmaWarpSpecialized>::CollectiveOp;
using Mainloop = typename cutlass::gemm::collective::CollectiveBuilder<
    cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, Element, Row, 8, Element, Column, 8, float,
    Tile, Cluster,
    cutlass::gemm::collective::StageCountAutoCarveout<static_cast<int>(
        sizeof(typename Epilogue::SharedStorage))>,
    Schedule>::CollectiveOp;
using Kernel =
    cutlass::gemm::kernel::GemmUniversal<cute::Shape<int, int, int, int>, Mainloop, Epilogue>;
using Gemm = cutlass::gemm::device::GemmUniversalAdapter<Kernel>;

typename Gemm::Arguments arguments(const GemmArgs& g) {
  const int m = static_cast<int>(g.M), n = static_cast<int>(g.N), k = static_cast<int>(g.K);
  typename Kernel::StrideA sa{};
  typename Kernel::StrideB sb{};
  typename Kernel::StrideD sd{};
  cute::get<0>(sa) = g.lda, cute::get<0>(sb) = g.ldb, cute::get<0>(sd) = g.ldc;
  typename Gemm::Arguments a{};
  a.mode = cutlass::gemm::GemmUniversalMode::kGemm;
  a.problem_shape = {m, n, k, 1};
  a.mainloop.ptr_A = static_cast<const Element*>(g.a), a.mainloop.dA = sa;
  a.mainloop.ptr_B = static_cast<const Element*>(g.b), a.mainloop.dB = sb;
  a.epilogue.thread.alpha = 1.0f, a.epilogue.thread.beta = 0.0f;
  a.epilogue.ptr_D = static_cast<Element*>(g.c), a.epilogue.dD = sd;
  return a;
}
void check(cutlass::Status s, const char* where) {
  if (s != cutlass::Status::kSuccess)
    throw Error(ExitCode::usage, cutlass::cutlassGetStatusString(s), where);
}

}  // namespace

std::string cutlass_missing() { return ""; }

int64_t gemm_cutlass_sm90_scratch_bytes(const GemmArgs& g) {
  return static_cast<int64_t>(Gemm::get_workspace_size(arguments(g)));
}
void gemm_cuda_cutlass_sm90(const GemmArgs& g, void* scratch, CudaStream stream) {
  if (g.M == 0 || g.N == 0) return;
  const auto a = arguments(g);
  Gemm gemm;
  check(gemm.can_implement(a), "CUTLASS product");
  check(gemm.initialize(a, scratch, stream), "CUTLASS product, start");
  check(gemm.run(stream), "CUTLASS product, launch");
}

}  // namespace v3b::kern
