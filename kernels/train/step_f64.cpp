#include "kernels/train/step_impl.h"
#include "kernels/train/step_make.h"

namespace v3b::kern::train {
std::unique_ptr<TrainStep> make_step_f64(const model::ModelConfig& c) {
  return std::make_unique<StepImpl<double, double>>(c);
}
}  // namespace v3b::kern::train
