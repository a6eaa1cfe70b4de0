// Shared by the declarations of the matrix-product ops: which columns of C are judged, and the
// tolerance that follows from the arithmetic.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <string>
#include <vector>

#include "bench/harness/op.h"
#include "kernels/core/cuda.h"
#include "kernels/gemm/gemm_libs_cuda.h"

namespace v3b::bench {

// The float64 reference of a product beyond this is cut to a sample of columns, the first, the last
// and others spread over all residues of 64; the others are skipped in Expected.
inline constexpr double kReferenceFlop = 6e9;
inline constexpr double kReferenceWeights = 4e7;  // elements of B as float64: 320 MB

inline std::vector<int64_t> judged_columns(int64_t m, int64_t n, int64_t k) {
  const double flop = 2.0 * double(m) * double(n) * double(k);
  const double part = std::min(kReferenceFlop / flop, kReferenceWeights / (double(n) * double(k)));
  std::vector<int64_t> c;
  if (!(part < 1)) {
    for (int64_t j = 0; j < n; ++j) c.push_back(j);
    return c;
  }
  const int64_t want = std::max<int64_t>(64, int64_t(double(n) * part));
  const double step =
      double(n - 1) / double(want - 1);  // not a multiple of a tile: hits every lane
  for (int64_t i = 0; i < want; ++i)
    c.push_back(std::min(n - 1, int64_t(std::lround(step * double(i)))));
  c.erase(std::unique(c.begin(), c.end()), c.end());
  return c;
}

// ExpectedTensor::skip of C [m, n] whose given columns are judged; empty if these are all of them.
inline std::vector<uint8_t> skip_but_columns(int64_t m, int64_t n,
                                             const std::vector<int64_t>& judged) {
  if (int64_t(judged.size()) == n) return {};
  std::vector<uint8_t> skip(size_t(m * n), 1);
  for (int64_t i = 0; i < m; ++i)
    for (const int64_t j : judged) skip[size_t(i * n + j)] = 0;
  return skip;
}

// fp32 sums of k exact products in any order: the error of a sum is at most a few times
// sqrt(k)*2^-24 of the size that sums have (SPEC 0.6: 1e-5 for k <= 18432), and one rounding of the
// output.
inline Tolerance product_tolerance(Fill fill, int64_t k, spec::DType out) {
  if (fill == Fill::exact) return {};
  Tolerance t{.rel_fro = 1e-5, .abs_rms = 8 * std::sqrt(double(k)) * 0x1p-24, .rel = 0x1p-22};
  if (out == spec::DType::bf16)
    t.rel_fro = 3e-3, t.rel = 0x1p-8 * 1.01;  // half an ulp is up to 2^-8
  return t;
}

// SPEC 0.6's class for FP8 on Hopper's tensor cores, for implementations whose sums are made there. Products of a segment of
// 128 are aligned to the largest exponent and keep about 14 bits: each loses up to 2^-13 of the largest partial sum, some
// 3 deviations of a segment, and 128 such losses (a uniform one is 0.29 of its range RMS, the range twice that as it goes
// towards zero) are 0.58 * sqrt(128) * 3 * 2^-13 = 2.4e-3 of the sum's size at most; an element five deviations. Integers
// of the exact fill need 12 bits and stay exact.
inline Tolerance hopper_fp8_tolerance(Fill fill) {
  if (fill == Fill::exact) return {};
  return {.rel_fro = 6e-3, .abs_rms = 5 * 2.4e-3, .rel = 0x1p-8 * 1.01};
}

// Code for sm_90a runs on no later architecture.
inline Support sm90a_support() {
  if (const std::string missing = kern::cutlass_missing(); !missing.empty())
    return {Support::State::not_built, missing};
  if (kern::cuda_device().cc != 90)
    return {Support::State::unsupported, "compiled for compute capability 9.0 only (wgmma, TMA)"};
  return {};
}
// Library forms of dense products that this build or machine may lack.
inline Support library_support(const std::string& refusal) {
  if (refusal.empty()) return {};
  return {Support::State::unsupported, refusal};
}

// The plain form with fp32 copies of its weights: not for shapes that would take minutes or half
// the memory.
inline Support eigen_support(int64_t m, int64_t n, int64_t k) {
  if (2.0 * double(m) * double(n) * double(k) > 6e10)
    return {Support::State::unsupported, "plain form, more than 60 GFLOP a run"};
  if (n * k > 250000000)
    return {Support::State::unsupported, "plain form keeps fp32 weights, over 1 GB"};
  return {};
}

}  // namespace v3b::bench
