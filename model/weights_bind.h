// Private to model/: binding with a function that says which file a tensor came from ("" = the
// checkpoint).
#pragma once
#include <functional>

#include "model/weights.h"

namespace v3b::model {

using FileOf = std::function<std::string(const std::string&)>;
ModelWeights bind_weights_from(const ModelConfig& config,
                               const std::map<std::string, TensorView>& table,
                               const LoadOptions& options, FileOf file_of);

}  // namespace v3b::model
