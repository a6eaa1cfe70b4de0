// A packed model (packed.h) in device memory.
#pragma once
#include <vector>

#include "kernels/core/cuda.h"
#include "kernels/forward/packed.h"

namespace v3b::kern {

struct DeviceLinear {  // [out, in] row-major, of the compute dtype
  int64_t out = 0, in = 0;
  const void* data = nullptr;
};
struct DeviceLayer {
  const float *input_norm = nullptr, *post_norm = nullptr, *q_a_norm = nullptr,
              *kv_a_norm = nullptr;
  DeviceLinear a_proj, q_b, kv_b, o_proj;
  DeviceLinear uk_t;  // [n_h, d_c, d_n]: W_UK of each head (in kv_b) transposed, for absorption
  bool is_moe = false;
  DeviceLinear gate_up, down;
  const float* router = nullptr;               // [E, d]
  DeviceLinear router_bf16;                    // only under router_dtype=bf16
  const float* bias = nullptr;                 // [E] or null
  const spec::FfnPointers* experts = nullptr;  // [E] in device memory, device pointers inside
  spec::FfnPointers shared{};                  // device pointers
};
struct DeviceMtp {
  const float *enorm = nullptr, *hnorm = nullptr, *norm = nullptr;
  DeviceLinear eh_proj;
  DeviceLayer layer;
  DeviceLinear own_embed, own_head;
};
struct DeviceModel {
  spec::DType dtype = spec::DType::bf16;
  DeviceLinear embed, head;
  const float* norm = nullptr;
  std::vector<DeviceLayer> layers;
  std::vector<DeviceMtp> mtp;
  std::vector<DeviceBuffer> storage;
  int64_t bytes = 0;
  const DeviceLinear& head_or_embed() const { return head.out > 0 ? head : embed; }
};

// Uploads; throws CudaOutOfMemory.
DeviceModel upload_model(const model::ModelConfig& c, const PackedModel& p);

}  // namespace v3b::kern
