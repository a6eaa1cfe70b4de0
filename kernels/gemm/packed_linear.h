// Whole products on packed weights (packed_weight.h): y = x W^T with the team, for the forward pass and the benchmarks.
#pragma once
#include <memory>

#include "kernels/core/buffer.h"
#include "kernels/gemm/packed_weight.h"

namespace v3b::kern {

// Owns a packed weight, in huge pages where the system gives them; each thread packs, and so first touches, the groups
// that it reads in packed_linear().
class PackedMatrix {
 public:
  PackedMatrix() = default;
  // scale: of f8e4m3 (PackedWeight::scale), not copied: the caller keeps it.
  explicit PackedMatrix(const PackSource& s, const float* scale = nullptr);
  PackedWeight view() const { return {type_, n_, k_, data_.data(), scale_}; }

 private:
  spec::DType type_ = spec::DType::bf16;
  int64_t n_ = 0, k_ = 0;
  const float* scale_ = nullptr;
  Buffer<uint8_t> data_;
};

struct LinearOut {
  void* c =
      nullptr;  // element (row i, output n) at i * ldc + n; nothing beyond the N outputs is written
  int64_t ldc = 0;
  spec::DType type = spec::DType::f32;  // f32 or bf16
  bool add = false;                     // to what c holds; f32 only
};
// x_scale: of FP8 activations, [m][ceil(K/128)]; null: all one; with an f8e4m3 weight only. Uses all OpenMP threads
// where the work is worth it; inside a parallel region one. Scratch is the calling threads' own and stays.
void packed_linear(const PackedWeight& w, const RowsSource& x, const LinearOut& out,
                   const float* x_scale = nullptr) noexcept;

// Outputs of groups [g0, g1) for the rows of x; one thread. out.c: row 0, output 0.
void packed_linear_part(const PackedWeight& w, const PackedRows& x, int64_t g0, int64_t g1,
                        const LinearOut& out) noexcept;
// The same for any number of rows where packed_many_takes() the weight.
void packed_many_part(const PackedWeight& w, const PackedRows& x, int64_t g0, int64_t g1,
                      const LinearOut& out) noexcept;
// Groups of outputs that a thread takes at a time, about 512 KiB of weights: for m rows and `parts` threads.
int64_t packed_unit(const PackedWeight& w, int64_t m, int parts) noexcept;
// from [rows, ld] into out, n outputs a row; one thread.
void packed_store(const float* from, int64_t ld, int64_t rows, int64_t n,
                  const LinearOut& out) noexcept;

}  // namespace v3b::kern
