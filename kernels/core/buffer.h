// Aligned memory for kernels and packed weights: 64-byte aligned, huge pages advised from 2 MiB on,
// first touched by the OpenMP threads in the static split that loops over it use (so that pages lie
// near them).
#pragma once
#include <cstddef>
#include <cstdint>
#include <type_traits>
#include <utility>

namespace v3b::kern {

// Throws std::bad_alloc. `touch` writes zeros with all threads; without it the content is undefined
// and pages are taken when first written. bytes == 0 gives nullptr.
void* aligned_alloc_bytes(size_t bytes, bool touch);
void aligned_free_bytes(void* p, size_t bytes) noexcept;
inline constexpr size_t kBufferAlign = 64;

// Owns n elements of a trivially copyable T; move-only.
template <class T>
class Buffer {
  static_assert(std::is_trivially_copyable_v<T>);

 public:
  Buffer() = default;
  explicit Buffer(int64_t n, bool touch = true)
      : p_(static_cast<T*>(aligned_alloc_bytes(static_cast<size_t>(n) * sizeof(T), touch))),
        n_(n) {}
  Buffer(Buffer&& o) noexcept : p_(std::exchange(o.p_, nullptr)), n_(std::exchange(o.n_, 0)) {}
  Buffer& operator=(Buffer&& o) noexcept {
    std::swap(p_, o.p_);
    std::swap(n_, o.n_);
    return *this;
  }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  ~Buffer() { aligned_free_bytes(p_, static_cast<size_t>(n_) * sizeof(T)); }

  // Grows to at least n elements; the old content is lost when it grows.
  void reserve_discard(int64_t n) {
    if (n > n_) *this = Buffer(n, false);
  }

  T* data() { return p_; }
  const T* data() const { return p_; }
  int64_t size() const { return n_; }
  T& operator[](int64_t i) { return p_[i]; }
  const T& operator[](int64_t i) const { return p_[i]; }
  T* begin() { return p_; }
  T* end() { return p_ + n_; }
  const T* begin() const { return p_; }
  const T* end() const { return p_ + n_; }

 private:
  T* p_ = nullptr;
  int64_t n_ = 0;
};

}  // namespace v3b::kern
