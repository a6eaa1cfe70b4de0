// What the CUDA backend and its decode loop share: the model on the device and the parts of a pass. All on one stream.
#pragma once
#include <memory>
#include <span>
#include <vector>

#include "kernels/forward/cuda_arena.h"
#include "kernels/forward/cuda_pass.h"
#include "kernels/forward/paged_sequence.h"
#include "model/backend.h"
#include "model/rope_table.h"

namespace v3b::kern {

class CudaModel {
 public:
  CudaModel(model::WeightsPtr w, spec::DType dtype, const model::BackendOptions& o);

  // Tables for positions below n; not during a capture.
  void extend_rope(int64_t n);
  // Dynamic scalings: the frequencies of this length. Throws Error(usage) where cached rows have others.
  void rotate_for(PagedSequence& seq, int64_t length);
  // Pages for the new rows of plan.items, tables for `longest` positions, and everything that the kernels read of the
  // plan in one upload into `buffer`.
  DevicePlan upload_plan(Plan& plan, int64_t longest, CudaArena& arena,
                         const std::vector<int32_t>& ids, DeviceBuffer& buffer);
  void embed(const DeviceLinear& table, int64_t rows, const int32_t* ids, float* h);
  // Layer `index` (num_hidden_layers: the MTP module's) over ws.h.
  void run_layer(int64_t index, const Plan& plan, const DevicePlan& dp, const RouteTap& routes);
  // ws.h of the MTP pass from its tokens and hidden rows [rows, d] f32. zero_first: mtp_zero_pos0 applies to row 0.
  void mtp_input(int64_t rows, const int32_t* next_ids, const float* hidden, bool zero_first);
  // Post-norm (or, flag mtp_hidden, raw) state of rows [first, first + n) of ws.h, f32.
  void hidden_rows(const float* norm, int64_t first, int64_t n, float* out);
  // Logits of n rows of the residual stream, [n, V] f32 in ws.logits. h: [n, d].
  float* logits(const float* norm, const DeviceLinear& head, const float* h, int64_t n);
  // The same of each item's last row, the head read once: [items, V].
  float* last_logits(const float* norm, const DeviceLinear& head, std::span<const PassItem> items);
  const DeviceLinear& mtp_head() const;

  model::BackendOptions options;
  model::ModelConfig cfg;
  spec::DType dtype;
  int64_t room = 0;
  bool dynamic_rope = false;
  DeviceModel weights;
  std::shared_ptr<PagePool> main_pool, mtp_pool;
  std::unique_ptr<CudaArena> main_arena, mtp_arena;
  DeviceWorkspace ws;
  CudaStream stream;

 private:
  spec::RouterConfig router_;
  bool use_bias_ = false;
  model::RopeFreqs freqs_;
  int64_t rope_positions_ = 0;
  DeviceBuffer cos_, sin_, mtp_embed_, mtp_in_;
};

// Of a backend made by make_cuda_backend.
CudaModel& cuda_model_of(model::Backend& backend);

}  // namespace v3b::kern
