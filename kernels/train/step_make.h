// The three instantiations of the training step, one a file. Internal to kernels/train.
#pragma once
#include <memory>

#include "kernels/train/step.h"

namespace v3b::kern::train {
std::unique_ptr<TrainStep> make_step_bf16(const model::ModelConfig& c);
std::unique_ptr<TrainStep> make_step_f32(const model::ModelConfig& c);
std::unique_ptr<TrainStep> make_step_f64(const model::ModelConfig& c);
}  // namespace v3b::kern::train
