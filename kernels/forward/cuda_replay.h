// A pass of the CUDA backend whose inputs are on the device and whose results stay there: the plan is made once, then the
// same pass is put on the stream as often as wanted, launch by launch or as one captured graph. For timing by events.
#pragma once
#include <span>
#include <vector>

#include "kernels/forward/cuda_model.h"

namespace v3b::kern {

// `backend` must come from make_cuda_backend (no dynamic RoPE scaling) and outlive this. Other passes of the backend in
// between must not be longer than those before capture(): captured addresses are of its buffers.
class CudaReplay {
 public:
  // What forward_batch(items, {logits last, hidden, routes}) computes; the sequences keep their length.
  CudaReplay(model::Backend& backend, std::span<const model::BatchItem> items);
  // What mtp_forward(sequence, next_ids, hidden) computes, the same way.
  CudaReplay(model::Backend& backend, model::Sequence& sequence, std::span<const int32_t> next_ids,
             std::span<const float> hidden);

  void enqueue(CudaStream stream);
  void capture(CudaStream stream);  // runs it once before: buffers grow
  void launch(CudaStream stream) { graph_.launch(stream); }
  void poison(CudaStream stream);  // outputs to NaN bytes
  std::vector<model::ForwardResult> fetch(CudaStream stream);

 private:
  void reserve_outputs();
  void layer(int64_t index, int64_t tapped);

  CudaModel& m_;
  bool mtp_ = false, zero_first_ = false;
  Plan plan_;
  DevicePlan dp_;
  DeviceBuffer plan_buffer_, mtp_hidden_;  // inputs
  DeviceBuffer logits_, hidden_, idx_,
      weight_;  // outputs: [items, V], [rows, d], [layers, rows, K]
  std::vector<int64_t> moe_layers_;
  CudaGraph graph_;
};

}  // namespace v3b::kern
