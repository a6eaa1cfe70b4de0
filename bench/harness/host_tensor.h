// A named tensor of an op's case on the host: guarded by canaries, poisonable, readable as double.
#pragma once
#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

#include "kernels/core/buffer.h"
#include "reference/spec/dtype.h"

namespace v3b::bench {

// A tensor that does not fit into the memory that is free.
class TooLarge : public std::runtime_error {
  using std::runtime_error::runtime_error;
};

enum class Role { input, output, inout };

class HostTensor {
 public:
  HostTensor() = default;
  // 64-byte aligned; canaries of 64 bytes before and after; from 512 KiB on in huge pages where the
  // system gives them, as the weights and the workspace of a model and the buffer of the peaks' probes
  // are (kernels/core/buffer.h). Outputs start as NaN (floats, NaN codes for f8) or 0x5A.. (integers);
  // inputs start as zero.
  HostTensor(std::string name, Role role, spec::DType dtype, std::vector<int64_t> shape);
  HostTensor(HostTensor&&) noexcept = default;
  HostTensor& operator=(HostTensor&&) noexcept = default;

  const std::string& name() const { return name_; }
  Role role() const { return role_; }
  spec::DType dtype() const { return dtype_; }
  const std::vector<int64_t>& shape() const { return shape_; }
  int64_t numel() const;
  int64_t bytes() const { return numel() * spec::dtype_bytes(dtype_); }
  void* data() { return data_; }
  const void* data() const { return data_; }
  template <class T>
  T* as() {
    return static_cast<T*>(data());
  }
  template <class T>
  const T* as() const {
    return static_cast<const T*>(data());
  }

  double get(int64_t i) const;    // element as double (exact)
  void set(int64_t i, double v);  // rounded to dtype (RNE, f8 saturating)
  std::vector<double> to_doubles() const;
  void read(int64_t first, int64_t n, double* out) const;  // elements [first, first+n) as doubles
  void poison();                                           // back to NaN / 0x5A
  void fill_nan_rows(int64_t first_row, int64_t rows);     // rows of the first dimension become NaN
  bool canaries_intact() const;

  // The fills of law 3 (values already rounded to dtype; deterministic in seed and name, any thread count).
  // real: N(0, std) where every 64th-ish channel (last dim) is an outlier channel of 8x; exact: integers in
  // [-3, 3] for GEMM-like ops, so that fp32 sums are exact.
  void fill_real(uint64_t seed, double std = 1.0, bool outliers = true);
  void fill_exact(uint64_t seed, int64_t max_abs = 3);

 private:
  std::string name_;
  Role role_ = Role::input;
  spec::DType dtype_ = spec::DType::f32;
  std::vector<int64_t> shape_;
  kern::Buffer<std::byte> storage_;
  std::byte* data_ = nullptr;
};

}  // namespace v3b::bench
