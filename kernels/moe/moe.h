// MoE kernels of the CPU backend: routing, grouped experts. FLOPs of experts 6*d*m a row, least
// bytes: the chosen experts' weights once plus 2*T*d*e (fused gather). SPEC 1.12-1.14.
#pragma once
#include <cstdint>
#include <memory>

#include "reference/spec/moe_dispatch.h"
#include "reference/spec/moe_experts.h"
#include "reference/spec/router.h"

namespace v3b::kern {

// Scores, selection and gate weights from fp32 logits; OpenMP over tokens.
void router_select_cpu_simd(const spec::RouterSelectArgs& a) noexcept;
const char* router_select_cpu_simd_isa() noexcept;

// Slots that keep their place under a capacity (SPEC 1.15). One pass over T*K slots; `prob` sorts
// nothing but cuts each overfull expert's slots at its capacity.
void moe_capacity_cpu(const spec::MoeCapacityArgs& a) noexcept;
// max(1, ceil(cf*K*T/E)), at most T*K.
int64_t moe_expert_capacity(double capacity_factor, int64_t K, int64_t T, int64_t E) noexcept;
// Rows to expert order (stable), and the weighted sum back. Pure moves; fp32 sums, k ascending, or
// bf16 sums, experts ascending.
void moe_dispatch_cpu_simd(const spec::MoeDispatchArgs& a) noexcept;
void moe_combine_cpu_simd(const spec::MoeCombineArgs& a) noexcept;
void moe_combine_rows(const spec::MoeCombineArgs& a) noexcept;  // its loop, beside the dispatch's
const char* moe_dispatch_cpu_simd_isa() noexcept;

// Scratch that grows to the largest call and is kept between calls (decode steps allocate nothing).
class MoeScratch {
 public:
  MoeScratch();
  ~MoeScratch();
  MoeScratch(MoeScratch&&) noexcept;
  struct Impl;
  Impl* impl() const { return impl_.get(); }

 private:
  std::unique_ptr<Impl> impl_;
};

// f32: fp32 arithmetic. bf16: bf16 GEMM inputs, fp32 accumulation, SwiGLU in fp32, hidden rounded
// to bf16 before the down projection, combine in fp32, one rounding of y. FP8 weights stay FP8 in
// memory.
void moe_experts_cpu_simd(const spec::MoeExpertsArgs& a, MoeScratch& scratch) noexcept;
const char* moe_experts_cpu_simd_isa(spec::DType x, spec::DType w) noexcept;
// Composition of library calls: gather, oneDNN per expert, SwiGLU loop, scatter (baseline; no FP8).
void moe_experts_cpu_onednn(const spec::MoeExpertsArgs& a, MoeScratch& scratch) noexcept;

}  // namespace v3b::kern
