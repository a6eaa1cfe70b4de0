// Out of device memory: its own type, so that a sweep can say so in a row and go on.
#pragma once
#include <cstdint>

#include "model/error.h"

namespace v3b::kern {

class CudaOutOfMemory : public Error {
 public:
  explicit CudaOutOfMemory(int64_t bytes)
      : Error(ExitCode::nothing_ran, "out of device memory", "CUDA", "",
              std::to_string(bytes) + " bytes wanted") {}
};

}  // namespace v3b::kern
