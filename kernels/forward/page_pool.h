// Paged latent cache of the CPU backend (SPEC 1.9): one arena a layer, one block table a sequence,
// shared by all layers. Arenas are reserved in address space and take memory when a page is first
// written.
#pragma once
#include <cstdint>
#include <memory>
#include <vector>

namespace v3b::kern {

class PagePool {
 public:
  // row_bytes of one token in one layer; max_rows: most rows of one sequence (sizes the
  // reservation). Throws v3b::Error if not even one such sequence can be reserved.
  PagePool(int64_t layers, int64_t page, int64_t row_bytes, int64_t max_rows);
  ~PagePool();
  PagePool(const PagePool&) = delete;
  PagePool& operator=(const PagePool&) = delete;

  int64_t page() const { return page_; }
  int64_t row_bytes() const { return row_bytes_; }
  uint8_t* arena(int64_t layer) { return arenas_[static_cast<size_t>(layer)]; }
  int64_t bytes_per_page() const;  // over all layers
  int32_t take();                  // a free page id; throws v3b::Error when none is left
  void give_back(int32_t id);      // when all are back, their memory returns to the system

 private:
  int64_t layers_, page_, row_bytes_, capacity_ = 0, used_ = 0;
  int32_t next_ = 0;  // ids below were handed out at least once
  size_t arena_bytes_ = 0;
  std::vector<uint8_t*> arenas_;
  std::vector<int32_t> free_;
};

// One sequence's rows in one pool.
class PagedTrack {
 public:
  explicit PagedTrack(std::shared_ptr<PagePool> pool) : pool_(std::move(pool)) {}
  ~PagedTrack() { shrink(0); }
  PagedTrack(const PagedTrack&) = delete;
  PagedTrack& operator=(const PagedTrack&) = delete;

  int64_t length() const { return length_; }
  int64_t bytes() const {
    return pool_ ? static_cast<int64_t>(blocks_.size()) * pool_->bytes_per_page() : 0;
  }
  const std::vector<int32_t>& blocks() const { return blocks_; }
  int64_t slot(int64_t row) const {
    return blocks_[static_cast<size_t>(row / pool_->page())] * pool_->page() + row % pool_->page();
  }
  void reserve(int64_t rows);  // pages for rows [0, rows); length unchanged
  void set_length(int64_t rows) { length_ = rows; }
  void shrink(int64_t rows);  // drops rows and their pages
  PagePool& pool() { return *pool_; }

 private:
  std::shared_ptr<PagePool> pool_;
  std::vector<int32_t> blocks_;
  int64_t length_ = 0;
};

}  // namespace v3b::kern
