// The fused quantisations' outputs, alike in rmsnorm and swiglu: what is expected, and how far it may be off.
#pragma once
#include <cmath>
#include <vector>

#include "bench/harness/op.h"
#include "reference/fp8_quant.h"
#include "reference/rmsnorm.h"

namespace v3b::bench {

// The outputs "codes" [T, n] and "scales" [T, ceil(n/128)] of y [T, n] rounded to bf16.
template <class S>
void quantise_rounded(int64_t T, int64_t n, std::vector<S>& y, spec::ActScale kind,
                      spec::f8e4m3* codes, float* scales) {
  for (S& v : y) v = ref::round_to(v, spec::DType::bf16);
  ref::fp8_quantize_act<S>(T, n, y.data(), codes, scales, kind);
}
inline void expect_quantised(int64_t T, int64_t n, std::vector<double> y, spec::ActScale kind,
                             Expected& e) {
  std::vector<spec::f8e4m3> codes(y.size());
  std::vector<float> scales(static_cast<size_t>(T * spec::fp8_blocks(n)));
  quantise_rounded(T, n, y, kind, codes.data(), scales.data());
  ExpectedTensor c{.name = "codes"};
  c.values.reserve(codes.size());
  for (const auto q : codes) c.values.push_back(spec::to_float(q));
  e.tensors.push_back(std::move(c));
  e.tensors.push_back({.name = "scales", .values = {scales.begin(), scales.end()}});
}

// The kernel's y is in fp32 before its one rounding, so it may be the neighbouring bf16 value where the exact y lies close
// to the middle of two; `flips`: the share of values where it can. A neighbour's code differs by at most one step, 1/8 of the
// value (2^-9 among the subnormal ones), where it crosses a threshold, one in 16 or fewer times; a neighbouring
// largest value moves its scale by one ulp of bf16, at most 2^-7, and its block's codes in one of 16. So of all codes a
// share of flips / 8 is off by 1/11 of its value (root mean square of 1/16..1/8), by norm sqrt(flips / 8) / 11; twice
// that for small cases. Always truncating instead of rounding gives 6e-2.
inline Tolerance quantised_tolerance(const std::string& output, double flips) {
  if (output == "scales") return {.rel_fro = 4e-3, .rel = 0x1.01p-7};
  return {.rel_fro = 2 * std::sqrt(flips / 8) / 11, .rel = 0.1251, .abs = 0x1.01p-9};
}

}  // namespace v3b::bench
