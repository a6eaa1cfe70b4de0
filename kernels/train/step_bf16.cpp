#include "kernels/train/step_impl.h"
#include "kernels/train/step_make.h"

namespace v3b::kern::train {
std::unique_ptr<TrainStep> make_step_bf16(const model::ModelConfig& c) {
  return std::make_unique<StepImpl<float, bf16>>(c);
}
}  // namespace v3b::kern::train
