// The parts of cuda.h that do not depend on the build.
#include <utility>

#include "kernels/core/cuda.h"

namespace v3b::kern {

DeviceBuffer& DeviceBuffer::operator=(DeviceBuffer&& o) noexcept {
  std::swap(data_, o.data_);
  std::swap(bytes_, o.bytes_);
  return *this;
}
void* DeviceBuffer::reserve(int64_t bytes) {
  if (bytes > bytes_) {
    *this = DeviceBuffer();
    *this = DeviceBuffer(bytes);
  }
  return data_;
}

}  // namespace v3b::kern
