// A whole model as a checkpoint file, tensor by tensor from where it lies: no second copy in memory.
#pragma once
#include <string>

#include "model/weights.h"

namespace v3b::model {

// Every tensor of named_tensors() under its Hugging Face name into one safetensors file, written beside its final name
// and renamed. Throws usage for FP8 matrices, cannot_write.
void save_weights(const std::string& path, const ModelWeights& w);

}  // namespace v3b::model
