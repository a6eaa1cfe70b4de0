#include "kernels/train/step_impl.h"
#include "kernels/train/step_make.h"

namespace v3b::kern::train {
std::unique_ptr<TrainStep> make_step_f32(const model::ModelConfig& c) {
  return std::make_unique<StepImpl<float, float>>(c);
}
}  // namespace v3b::kern::train
