// Which MTP checkpoints the backends run.
#pragma once
#include <string>

#include "model/config.h"
#include "model/error.h"

namespace v3b::model {

// Every backend runs one MTP module, V3's D = 1 (SPEC 1.25). Throws bad_input on a configuration
// with more: modules 2..D need the states and caches of those before them, and drafting with the
// first alone would be silently another model. Plain forward passes take such checkpoints.
inline void check_single_mtp(const ModelConfig& config, const std::string& where) {
  if (config.num_nextn_predict_layers > 1)
    throw Error(ExitCode::bad_input, "checkpoints with several MTP modules cannot be run with MTP",
                where, "num_nextn_predict_layers of 1",
                std::to_string(config.num_nextn_predict_layers));
}

}  // namespace v3b::model
