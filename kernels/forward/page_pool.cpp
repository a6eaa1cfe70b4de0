#include "kernels/forward/page_pool.h"

#include <sys/mman.h>

#include <algorithm>
#include <string>

#include "model/error.h"

namespace v3b::kern {
namespace {
// Address space, not memory: room for many sequences of the longest context, within what 47 bits
// easily hold.
constexpr int64_t kWantedSequences = 256;
constexpr int64_t kMostBytesAnArena = int64_t{1} << 36;
}  // namespace

PagePool::PagePool(int64_t layers, int64_t page, int64_t row_bytes, int64_t max_rows)
    : layers_(layers), page_(page), row_bytes_(row_bytes) {
  if (page < 1)
    throw Error(ExitCode::usage, "cache page must hold at least one row", "page_size", ">= 1",
                std::to_string(page));
  const int64_t page_bytes = page * row_bytes;
  const int64_t one = (max_rows + page - 1) / page;
  int64_t pages = std::max(one, std::min(one * kWantedSequences, kMostBytesAnArena / page_bytes));
  pages = std::min<int64_t>(pages, INT32_MAX / page);  // slots are 32-bit in the kernels
  for (; pages >= 1; pages /= 2) {
    arena_bytes_ = static_cast<size_t>(pages * page_bytes);
    for (int64_t l = 0; l < layers; ++l) {
      void* p = mmap(nullptr, arena_bytes_, PROT_READ | PROT_WRITE,
                     MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
      if (p == MAP_FAILED) break;
      arenas_.push_back(static_cast<uint8_t*>(p));
    }
    if (static_cast<int64_t>(arenas_.size()) == layers) break;
    for (uint8_t* a : arenas_) munmap(a, arena_bytes_);
    arenas_.clear();
  }
  if (pages < 1) throw Error(ExitCode::usage, "no address space for the cache", "page pool");
  capacity_ = pages;
}

PagePool::~PagePool() {
  for (uint8_t* a : arenas_) munmap(a, arena_bytes_);
}

int64_t PagePool::bytes_per_page() const { return layers_ * page_ * row_bytes_; }

int32_t PagePool::take() {
  if (!free_.empty()) {
    const int32_t id = free_.back();
    free_.pop_back();
    ++used_;
    return id;
  }
  if (next_ >= capacity_)
    throw Error(ExitCode::usage, "cache pages exhausted", "page pool",
                std::to_string(capacity_) + " pages at most");
  ++used_;
  return next_++;
}

void PagePool::give_back(int32_t id) {
  free_.push_back(id);
  if (--used_ > 0) return;
  const size_t touched = static_cast<size_t>(next_) * static_cast<size_t>(page_ * row_bytes_);
  constexpr size_t kOsPage = 4096;
  for (uint8_t* a : arenas_)
    (void)madvise(a, (touched + kOsPage - 1) / kOsPage * kOsPage, MADV_DONTNEED);
  free_.clear();
  next_ = 0;
}

void PagedTrack::reserve(int64_t rows) {
  const size_t want = static_cast<size_t>((rows + pool_->page() - 1) / pool_->page());
  while (blocks_.size() < want) blocks_.push_back(pool_->take());
}

void PagedTrack::shrink(int64_t rows) {
  if (!pool_) return;
  const size_t keep = static_cast<size_t>((rows + pool_->page() - 1) / pool_->page());
  while (blocks_.size() > keep) {
    pool_->give_back(blocks_.back());
    blocks_.pop_back();
  }
  length_ = std::min(length_, rows);
}

}  // namespace v3b::kern
