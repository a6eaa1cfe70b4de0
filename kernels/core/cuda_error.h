// Errors with types of their own. Out of device memory: a sweep says so in a row and goes on. A fault: the sweep says
// which job it was and ends, because nothing runs on the device any more in this process.
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

class CudaFault : public Error {
 public:
  CudaFault(const std::string& what, const std::string& found)
      : Error(ExitCode::check_failed, what, "CUDA", "", found) {}
};

}  // namespace v3b::kern
