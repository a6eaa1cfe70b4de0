// The ops whose weight is packed once, at load (packed_weight.h). Levels AVX2, AVX-512, AVX512_BF16, AMX.
#pragma once
#include "kernels/gemm/gemm.h"
#include "kernels/gemm/packed_linear.h"
#include "reference/spec/fp8_gemm.h"
#include "reference/spec/lm_head_ce.h"
#include "reference/spec/mla_absorb.h"

namespace v3b::kern {

// A linear layer: trans_b, not trans_a. g.b is read by the first and not by the second.
PackedMatrix gemm_pack(const GemmArgs& g);
void gemm_cpu_packed(const GemmArgs& g, const PackedWeight& w) noexcept;

PackedMatrix fp8_gemm_pack(const spec::Fp8GemmArgs& a);  // keeps a.sb
void fp8_gemm_cpu_packed(const spec::Fp8GemmArgs& a, const PackedWeight& w) noexcept;

PackedMatrix lm_head_pack(const spec::LmHeadCeArgs& a);
void lm_head_ce_cpu_packed(const spec::LmHeadCeArgs& a, const PackedWeight& w) noexcept;

// A weight [n, k] a head. Head h of the source starts at w + h * stride elements: rows of `ld`, or, k_major, [k, ld].
struct HeadsSource {
  spec::DType type = spec::DType::bf16;
  int64_t heads = 0, n = 0, k = 0;
  const void* w = nullptr;
  int64_t ld = 0, stride = 0;
  bool k_major = false;
};
class PackedHeads {
 public:
  PackedHeads() = default;
  explicit PackedHeads(const HeadsSource& s);
  PackedWeight head(int64_t h) const { return {type_, n_, k_, data_.data() + h * bytes_}; }
  int64_t heads() const { return heads_; }

 private:
  spec::DType type_ = spec::DType::bf16;
  int64_t heads_ = 0, n_ = 0, k_ = 0, bytes_ = 0;
  Buffer<uint8_t> data_;
};
// y[t][h] [n] = W_h x[t][h] [k]; row t of head h at t * ld + h * head elements, x and y of the weights' type.
struct HeadsArgs {
  int64_t T = 0;
  const void* x = nullptr;
  int64_t ld_x = 0, head_x = 0;
  void* y = nullptr;
  int64_t ld_y = 0, head_y = 0;
};
void packed_heads(const HeadsArgs& a, const PackedHeads& w) noexcept;
void mla_absorb_cpu_packed(const spec::MlaAbsorbArgs& a, const PackedHeads& w) noexcept;

}  // namespace v3b::kern
