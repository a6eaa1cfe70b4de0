// moe_experts.cpu_packed: experts packed as a loader does it, then the kernel.
#pragma once
#include <memory>
#include <vector>

#include "bench/harness/op.h"
#include "kernels/moe/packed_experts.h"
#include "reference/spec/moe_experts.h"

namespace v3b::bench {

inline Support packed_experts_support(const spec::MoeExpertsShape& s) {
  Support ok;
  if (!kern::PackedExperts::supports(s.dtype, s.w_dtype))
    ok = {Support::State::unsupported, "packed experts take bf16 rows, or f32 rows and weights"};
  return ok;
}

// loads: tokens of each expert. What nobody chose keeps its place and is not written.
inline Runner packed_experts_runner(const spec::MoeExpertsArgs& a,
                                    const std::vector<int64_t>& loads) {
  struct Packed {
    kern::PackedExperts experts;
    kern::MoeScratch scratch;
  };
  auto p = std::make_shared<Packed>();
  p->experts = kern::PackedExperts({a.d, a.m, a.E, a.shared_m, a.w_dtype});
  for (int64_t e = 0; e < a.E; ++e)
    if (loads[static_cast<size_t>(e)] > 0) p->experts.pack(e, a.experts[e]);
  if (a.shared_m > 0) p->experts.pack(a.E, a.shared);
  return {.run = [a, p] { kern::moe_experts_cpu_packed(a, p->experts, p->scratch); },
          .resolved_isa = kern::moe_experts_cpu_packed_isa(a.x_dtype, a.w_dtype)};
}

}  // namespace v3b::bench
