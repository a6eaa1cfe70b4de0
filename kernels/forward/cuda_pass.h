// One pass of the CUDA backend over rows of one or several sequences: device scratch, device plan, one layer. Nothing
// here waits for the device or allocates once the buffers have grown, so a CUDA graph can capture a pass.
#pragma once
#include <functional>
#include <vector>

#include "kernels/forward/cuda_weights.h"
#include "kernels/forward/pass.h"

namespace v3b::kern {

// A Plan's arrays on the device; units and items stay on the host.
struct DevicePlan {
  int64_t rows = 0, page = 64;
  const int32_t* positions = nullptr;  // [rows]
  const int32_t* slots = nullptr;      // [rows]
  const int32_t* tables = nullptr;     // as Plan::tables
  const int32_t* seqlens = nullptr;    // as Plan::seqlens
  const int32_t* ids = nullptr;        // [rows]
  std::vector<const int32_t*>
      item_tables;  // [items] pages of each sequence (expanded attention over old rows)
};

// Grows to the largest pass and stays.
struct DeviceWorkspace {
  DeviceBuffer h, a, x32, logits, x, cq, q, lat, q_abs, o_lat, attn, kv_rows, kvb, gate_up, hidden,
      y, idx, weight, attention, experts, tail, served, last;
};

struct CudaLayerContext {
  const model::ModelConfig& c;
  const spec::Flags& flags;
  spec::DType dtype;
  spec::RouterConfig router;
  bool use_bias;
  const float *cos, *sin;  // [positions, d_r / 2]
  double softmax_scale;
  double capacity_factor;  // model::BackendOptions
};

// ws.q [rows, n_h, d_qk] and ws.lat [rows, d_c + d_r] -> ws.attn [rows, n_h, d_v] of the item's rows, which are in the
// cache already. table: the item's pages.
void attention_expanded_cuda(const CudaLayerContext& ctx, const AttentionDims& m,
                             const DeviceLayer& p, const PassItem& item, const int32_t* table,
                             int64_t page, uint8_t* arena, DeviceWorkspace& ws, CudaStream stream);
// The same of a unit's rows, by the latent rows in the pages.
void attention_absorbed_cuda(const CudaLayerContext& ctx, const AttentionDims& m,
                             const DeviceLayer& p, const AttentionUnit& u, const DevicePlan& dp,
                             uint8_t* arena, DeviceWorkspace& ws, CudaStream stream);

// h [rows, d] f32 in ws.h is the residual stream. `arena`: this layer's pages.
void run_attention_cuda(const CudaLayerContext& ctx, const DeviceLayer& p, uint8_t* arena,
                        const Plan& plan, const DevicePlan& dp, DeviceWorkspace& ws,
                        CudaStream stream);
// routes: called after the router with device idx [n, K] and weight [n, K] of rows [r0, r0 + n), and with a capacity
// the served ones of idx [n, K] (-1: dropped), else null; or empty.
using RouteTap = std::function<void(int64_t r0, int64_t n, const int32_t* idx, const float* weight,
                                    const int32_t* served)>;
void run_ffn_cuda(const CudaLayerContext& ctx, const DeviceLayer& p, int64_t rows,
                  DeviceWorkspace& ws, const RouteTap& routes, CudaStream stream);

// y [M, out] = x [M, in] W^T.
void linear_cuda(spec::DType dtype, const DeviceLinear& w, int64_t M, const void* x, int64_t ldx,
                 void* y, int64_t ldy, spec::DType y_type, CudaStream stream,
                 bool accumulate = false);

}  // namespace v3b::kern
