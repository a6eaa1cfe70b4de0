// The experts of a layer packed once at load (gemm/packed_weight.h): gate, up and down of every routed expert and of
// the shared one, in bf16, f32 or FP8 codes. FP8 scales are copied as they are, so a loader may release the source of
// an expert as soon as pack() has returned. Gate and up [m, d], down [d, m]; SPEC 1.13.
#pragma once
#include <cstddef>
#include <cstdint>
#include <vector>

#include "kernels/core/buffer.h"
#include "kernels/gemm/packed_weight.h"
#include "kernels/moe/moe.h"

namespace v3b::kern {

class PackedExperts {
 public:
  struct Shape {
    int64_t d = 0, m = 0, E = 0;
    int64_t shared_m = 0;  // 0: no shared expert
    spec::DType type = spec::DType::bf16;
  };
  PackedExperts() = default;
  // Reserves the memory, huge pages advised; pages are taken when pack() writes them. Throws std::bad_alloc.
  explicit PackedExperts(const Shape& s);
  PackedExperts(const Shape& s, const spec::FfnPointers* experts, const spec::FfnPointers& shared);

  // Expert e of E; e == E: the shared one. All threads; each writes, and so places, the part of every matrix that it
  // reads first in moe_experts_cpu_packed().
  void pack(int64_t e, const spec::FfnPointers& f);

  const Shape& shape() const { return s_; }
  int64_t bytes() const { return data_.size() + 4 * scale_.size(); }
  struct Ffn {
    PackedWeight gate, up, down;
  };
  const Ffn& expert(int64_t e) const { return ffn_[static_cast<size_t>(e)]; }  // e == E: shared
  // x and y bf16 with any weight, or f32 with f32: what packed products reach the op's tolerance with.
  static bool supports(spec::DType x, spec::DType w);

 private:
  Shape s_;
  Buffer<std::byte> data_;
  Buffer<float> scale_;
  std::vector<Ffn> ffn_;
};

// The op on packed experts; a.experts and a.shared are not read, the rest of a is as in moe.h. a.d, m, E, shared_m and
// w_dtype are those of `w`.
void moe_experts_cpu_packed(const spec::MoeExpertsArgs& a, const PackedExperts& w,
                            MoeScratch& scratch) noexcept;
const char* moe_experts_cpu_packed_isa(spec::DType x, spec::DType w) noexcept;

}  // namespace v3b::kern
