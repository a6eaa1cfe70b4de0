// Expert products without tensor cores, every pair of types, and the whole op around either form. A warp computes one
// column for up to 8 rows of an expert: weights are read once per 8 rows, which is the least for decode.
// Bounds on H100: 6 d m FLOPs a row at 67 TFLOP/s fp32; the chosen experts' weights at 3.35 TB/s.
#include <algorithm>

#include "kernels/moe/moe_cuda.h"
#include "kernels/moe/moe_experts_cuda.h"
#include "kernels/moe/moe_groups.cuh"
#include "model/error.h"
#include "reference/spec/fp8_quant.h"

namespace v3b::kern {
namespace {

using namespace dev;
using spec::DType;

constexpr int kThreads = 256, kRows = 8;

template <class TX, class TW, bool kGateUp>
__global__ void __launch_bounds__(kThreads) ffn_rows_kernel(const MoeFfnArgs a) {
  const GroupTile at = find_tile<kRows>(a.groups, blockIdx.x);
  const int64_t columns = kGateUp ? a.m : a.d, K = kGateUp ? a.d : a.m;
  const int64_t n = int64_t{blockIdx.y} * (kThreads / 32) + warp_id();
  if (at.expert < 0 || n >= columns) return;  // whole warps; no barrier follows
  const spec::FfnPointers f = a.experts[at.expert];
  const TW* w0 = static_cast<const TW*>(kGateUp ? f.gate : f.down) + n * K;
  const TW* w1 = static_cast<const TW*>(kGateUp ? f.up : f.down) + n * K;
  const int64_t scales = n / 128 * ((K + 127) / 128);
  const float *s0 = nullptr, *s1 = nullptr;
  if constexpr (std::is_same_v<TW, f8e4m3>)
    s0 = (kGateUp ? f.gate_scale : f.down_scale) + scales,
    s1 = (kGateUp ? f.up_scale : f.down_scale) + scales;
  const TX* x[kRows];
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    const int64_t row = at.row + (r < at.rows ? r : 0);
    if constexpr (kGateUp)
      x[r] = static_cast<const TX*>(a.x) + (a.source == nullptr ? row : a.source[row]) * K;
    else
      x[r] = static_cast<const TX*>(a.hidden) + row * K;
  }
  float u[kRows] = {}, v[kRows] = {};
#pragma unroll 2
  for (int64_t k = lane_id(); k < K; k += 32) {
    float y0 = as_float(w0[k]), y1 = 0;
    if constexpr (kGateUp) y1 = as_float(w1[k]);
    if constexpr (std::is_same_v<TW, f8e4m3>) {
      y0 *= s0[k / 128];
      if constexpr (kGateUp) y1 *= s1[k / 128];
    }
#pragma unroll
    for (int r = 0; r < kRows; ++r)
      if (r < at.rows) {
        const float xv = as_float(x[r][k]);
        u[r] += xv * y0;
        if constexpr (kGateUp) v[r] += xv * y1;
      }
  }
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    const float s = warp_sum(u[r]);
    if constexpr (kGateUp) {
      const float t = warp_sum(v[r]);
      if (r < at.rows && lane_id() == 0)
        static_cast<TX*>(a.hidden)[(at.row + r) * columns + n] = from_float<TX>(silu_times(s, t));
    } else {
      if (r < at.rows && lane_id() == 0) a.out[(at.row + r) * columns + n] = s;
    }
  }
}

template <class TX, class TW>
void run(const MoeFfnArgs& a, CudaStream stream) {
  const auto grid = [&](int64_t columns) {
    return dim3(static_cast<unsigned>(tile_bound(a.groups, kRows)),
                static_cast<unsigned>((columns + 7) / 8));
  };
  launch(ffn_rows_kernel<TX, TW, true>, {grid(a.m), kThreads, 0, stream}, a);
  launch(ffn_rows_kernel<TX, TW, false>, {grid(a.d), kThreads, 0, stream}, a);
}
template <class TX>
void run(const MoeFfnArgs& a, CudaStream stream) {
  if (a.w_type == DType::f32)
    run<TX, float>(a, stream);
  else if (a.w_type == DType::bf16)
    run<TX, bf16>(a, stream);
  else
    run<TX, f8e4m3>(a, stream);
}

// token of a row, from the row of a slot.
__global__ void __launch_bounds__(kThreads)
    source_kernel(int64_t slots, int64_t K, const int64_t* row, int32_t* source) {
  const int64_t s = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (s < slots && row[s] >= 0) source[row[s]] = static_cast<int32_t>(s / K);
}
// y[t] = sum over k of weight * row, then the shared expert's row: fp32, one rounding. bf16_steps (MoeAccum::bf16): every
// row, product and partial sum rounded to bf16, rows ascending.
template <class TR, class TX>
__global__ void __launch_bounds__(kThreads)
    combine_kernel(int64_t d, int64_t K, bool bf16_steps, const TR* rows, const int64_t* row,
                   const float* weight, const TR* shared_rows, TX* y) {
  const int64_t t = blockIdx.x, j = int64_t{blockIdx.y} * kThreads + threadIdx.x;
  if (j >= d) return;
  float s = 0;
  const auto cut = [](float v) { return as_float(round_bf16(v)); };
  if (bf16_steps) {
    for (int64_t last = -1;;) {
      int64_t next = -1;
      float w = 0;
      for (int64_t k = 0; k < K; ++k) {
        const int64_t r = row[t * K + k];
        if (r > last && (next < 0 || r < next)) next = r, w = weight[t * K + k];
      }
      if (next < 0) break;
      s = cut(s + cut(w * cut(as_float(rows[next * d + j]))));
      last = next;
    }
    if (shared_rows != nullptr) s = cut(s + cut(as_float(shared_rows[t * d + j])));
  } else {
    for (int64_t k = 0; k < K; ++k) {
      const int64_t r = row[t * K + k];
      if (r >= 0) s += weight[t * K + k] * as_float(rows[r * d + j]);
    }
    if (shared_rows != nullptr) s += as_float(shared_rows[t * d + j]);
  }
  y[t * d + j] = from_float<TX>(s);
}

struct Layout {  // of the scratch
  int64_t offsets, row, source, plan, experts, hidden, rows, shared_hidden, shared_rows, codes,
      scales, bytes;
};
bool fp8_rows(const spec::MoeExpertsArgs& a) { return a.x_dtype == DType::f8e4m3; }
spec::MoeDispatchArgs plan_of(const spec::MoeExpertsArgs& a) {
  return {a.T, a.d, a.E, a.K, a.x_dtype, a.x, a.idx, nullptr, nullptr, nullptr};
}
Layout layout_of(const spec::MoeExpertsArgs& a) {
  Layout l{};
  int64_t at = 0;
  const auto take = [&](int64_t bytes) {
    const int64_t here = at;
    at += (bytes + 255) / 256 * 256;
    return here;
  };
  const int64_t slots = a.T * a.K, e = a.x_dtype == DType::f32 ? 4 : 2;
  // Codes and scales of the hidden rows, of the experts first, of the shared one then.
  const int64_t coded = fp8_rows(a) ? std::max(slots * a.m, a.T * a.shared_m) : 0,
                blocks = fp8_rows(a) ? std::max(slots * spec::fp8_blocks(a.m),
                                                a.T * spec::fp8_blocks(a.shared_m))
                                     : 0;
  l.offsets = take((a.E + 1) * 8);
  l.row = take(slots * 8);
  l.source = take(slots * 4);
  l.plan = take(moe_dispatch_cuda_scratch_bytes(plan_of(a)));
  l.experts = take(sizeof(spec::FfnPointers));
  l.hidden = take(slots * a.m * e);
  l.rows = take(slots * a.d * 4);
  l.shared_hidden = take(a.shared_m > 0 ? a.T * a.shared_m * e : 0);
  l.shared_rows = take(a.shared_m > 0 ? a.T * a.d * 4 : 0);
  l.codes = take(coded);
  l.scales = take(blocks * 4);
  l.bytes = at;
  return l;
}
// The shared expert's pointers travel as a kernel argument: a copy from the host could not be captured safely.
__global__ void put_kernel(spec::FfnPointers f, spec::FfnPointers* to) {
  if (threadIdx.x == 0) *to = f;
}

template <class F>
void whole(const spec::MoeExpertsArgs& a, void* scratch, CudaStream stream, F&& ffn) {
  if (a.T == 0) return;
  const Layout l = layout_of(a);
  char* base = static_cast<char*>(scratch);
  const int64_t slots = a.T * a.K;
  auto* offsets = reinterpret_cast<int64_t*>(base + l.offsets);
  auto* row = reinterpret_cast<int64_t*>(base + l.row);
  auto* source = reinterpret_cast<int32_t*>(base + l.source);
  auto* rows = reinterpret_cast<float*>(base + l.rows);
  spec::MoeDispatchArgs plan = plan_of(a);
  plan.offsets = offsets, plan.row = row;
  moe_dispatch_cuda_simt(plan, base + l.plan, stream);
  launch(source_kernel,
         {dim3(static_cast<unsigned>((slots + kThreads - 1) / kThreads)), kThreads, 0, stream},
         slots, a.K, row, source);
  MoeFfnArgs f{};
  f.groups = {a.E, offsets, slots, a.T, nullptr, 0};
  f.d = a.d, f.m = a.m, f.x_type = a.x_dtype, f.w_type = a.w_dtype, f.x = a.x, f.source = source;
  f.experts = a.experts, f.hidden = base + l.hidden, f.out = rows;
  if (fp8_rows(a)) {
    f.x_scale = a.x_scale;
    f.hidden_codes = reinterpret_cast<spec::f8e4m3*>(base + l.codes);
    f.hidden_scale = reinterpret_cast<float*>(base + l.scales);
  }
  ffn(f, stream);
  float* shared_rows = nullptr;
  if (a.shared_m > 0) {
    auto* expert = reinterpret_cast<spec::FfnPointers*>(base + l.experts);
    shared_rows = reinterpret_cast<float*>(base + l.shared_rows);
    launch(put_kernel, {dim3(1), 32, 0, stream}, a.shared, expert);
    f.groups = {1, nullptr, a.T, a.T, nullptr, a.T};
    f.m = a.shared_m, f.source = nullptr, f.experts = expert;
    f.hidden = base + l.shared_hidden, f.out = shared_rows;
    ffn(f, stream);
  }
  moe_experts_combine_cuda_simt({a.T, a.d, a.K, a.x_dtype == DType::f32 ? DType::f32 : DType::bf16,
                                 rows, row, a.weight, a.y, a.moe_accum},
                                DType::f32, shared_rows, stream);
}

}  // namespace

void moe_ffn_cuda_simt(const MoeFfnArgs& a, CudaStream stream) {
  if (tile_bound(a.groups, 1) == 0 || a.m == 0) return;
  if (a.x_type == DType::bf16)
    run<bf16>(a, stream);
  else
    run<float>(a, stream);
}
int64_t moe_experts_cuda_scratch_bytes(const spec::MoeExpertsArgs& a) { return layout_of(a).bytes; }
void moe_experts_combine_cuda_simt(const spec::MoeCombineArgs& c, DType rows_type,
                                   const void* shared_rows, CudaStream stream) {
  const LaunchConfig config = {
      dim3(static_cast<unsigned>(c.T), static_cast<unsigned>((c.d + kThreads - 1) / kThreads)),
      kThreads, 0, stream};
  const auto run = [&]<class TR, class TX>(const TR* rows, TX* y) {
    launch(combine_kernel<TR, TX>, config, c.d, c.K, c.moe_accum == spec::MoeAccum::bf16, rows,
           c.row, c.weight, static_cast<const TR*>(shared_rows), y);
  };
  if (rows_type == DType::bf16)
    run(static_cast<const bf16*>(c.rows), static_cast<bf16*>(c.y));
  else if (c.dtype == DType::bf16)
    run(static_cast<const float*>(c.rows), static_cast<bf16*>(c.y));
  else
    run(static_cast<const float*>(c.rows), static_cast<float*>(c.y));
}
void moe_experts_cuda_mma(const spec::MoeExpertsArgs& a, void* scratch, CudaStream stream) {
  if (a.x_dtype == DType::f32 || a.w_dtype == DType::f32 ||
      (fp8_rows(a) && a.w_dtype != DType::f8e4m3))
    throw Error(ExitCode::usage, "expert products on tensor cores", "types of the arguments",
                "x bf16 with weights bf16 or f8e4m3, or both f8e4m3", "");
  whole(a, scratch, stream, fp8_rows(a) ? moe_ffn_fp8_cuda_mma : moe_ffn_cuda_mma);
}
void moe_experts_cuda_simt(const spec::MoeExpertsArgs& a, void* scratch, CudaStream stream) {
  whole(a, scratch, stream, moe_ffn_cuda_simt);
}

}  // namespace v3b::kern
