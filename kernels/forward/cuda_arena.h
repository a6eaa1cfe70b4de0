// Device pages of a latent cache. Page ids and their bookkeeping are PagePool's (host); this holds the bytes: one buffer
// a layer, grown by doubling, content kept.
#pragma once
#include <algorithm>
#include <memory>
#include <vector>

#include "kernels/core/cuda.h"
#include "kernels/forward/page_pool.h"

namespace v3b::kern {

class CudaArena {
 public:
  CudaArena(int64_t layers, int64_t page, int64_t row_bytes)
      : page_bytes_(page * row_bytes), buffers_(static_cast<size_t>(layers)) {}
  uint8_t* layer(int64_t l) const { return buffers_[static_cast<size_t>(l)].as<uint8_t>(); }
  // Room for page ids below `pages`. Not during a capture.
  void ensure(int64_t pages) {
    if (pages <= pages_) return;
    const int64_t grown = std::max(pages, 2 * pages_);
    for (DeviceBuffer& b : buffers_) {
      DeviceBuffer bigger(grown * page_bytes_);
      cuda_fill(bigger.data(), 0xFF, bigger.bytes(), cuda_stream());  // NaN until written
      if (b.bytes() > 0) cuda_copy(bigger.data(), b.data(), b.bytes(), cuda_stream());
      cuda_synchronize(cuda_stream());
      b = std::move(bigger);
    }
    pages_ = grown;
  }
  int64_t bytes() const { return pages_ * page_bytes_ * static_cast<int64_t>(buffers_.size()); }

 private:
  int64_t page_bytes_, pages_ = 0;
  std::vector<DeviceBuffer> buffers_;
};

}  // namespace v3b::kern
