// What the attention ops share: scales, lengths, tolerances, float copies for the plain-reference
// baseline.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <initializer_list>
#include <string>
#include <vector>

#include "bench/harness/cuda_mirror.h"
#include "bench/harness/op.h"
#include "kernels/core/cuda.h"
#include "reference/mla.h"

namespace v3b::bench {

// V3's scale (YaRN's mscale at factor 40, squared) at its head dimension, else d^(-1/2): a
// forgotten mscale fails.
inline double attention_scale(int64_t d_qk) {
  return ref::mla_scale(d_qk, d_qk == 192 ? 0.1 * std::log(40.0) + 1 : 1.0);
}

// Lengths of B sequences: from s down to min_s in even steps (min_s < 0: all s).
inline std::vector<int32_t> attention_lengths(int64_t B, int64_t s, int64_t min_s) {
  std::vector<int32_t> r(static_cast<size_t>(B), static_cast<int32_t>(s));
  if (min_s >= 0 && B > 1)
    for (int64_t b = 0; b < B; ++b)
      r[static_cast<size_t>(b)] = static_cast<int32_t>(s - (s - min_s) * b / (B - 1));
  return r;
}

// Lengths that attention_lengths can make, in batches that are worth a table of lengths.
inline void validate_lengths(int64_t B, int64_t s, int64_t min_s, const char* where) {
  constexpr int64_t kBatch = 1 << 16;
  if (B > kBatch)
    throw Error(ExitCode::usage, "'B' is too large", where, "at most " + std::to_string(kBatch),
                std::to_string(B));
  if (min_s > s)
    throw Error(ExitCode::usage, "'min_s' is larger than 's'", where,
                "at most " + std::to_string(s), std::to_string(min_s));
}

// By norm: P and o rounded to bf16, 1.66e-3 RMS each (a uniform error of up to half an ulp, 2^-9 to 2^-8 of the
// value), 2.35e-3 together. Twice that for P: its terms cancel where the values do.
inline constexpr double kAttentionBf16 = 4e-3;

// SPEC 0.6. lse: fp32 sums of exact products. bf16 o: P is rounded (2^-9 of each term) and so is
// the output. In a decode step every row averages many keys; one element of an outlier channel (8x)
// may be off by several sigma.
inline Tolerance attention_tolerance(spec::DType dtype, const std::string& output) {
  if (output == "lse") return {.rel_fro = 1e-5, .abs_rms = 1e-5, .rel = 1e-5, .abs = 1e-5};
  if (dtype == spec::DType::f32) return {.rel_fro = 1e-5, .abs_rms = 5e-5, .rel = 5e-5};
  return {.rel_fro = kAttentionBf16, .abs_rms = 0.03, .rel = 2.01 / 128};
}
// In prefill the first rows see few keys, whose values may cancel: 2^-9 sum p |v| with |v| ~ 3 is
// the error then, whatever the rms of all rows. v has no outlier channels there.
inline Tolerance prefill_tolerance(spec::DType dtype, const std::string& output) {
  if (output == "lse" || dtype == spec::DType::f32) return attention_tolerance(dtype, output);
  return {.rel_fro = kAttentionBf16, .abs_rms = 5e-3, .rel = 2.01 / 128, .abs = 6e-3};
}

// What the CPU kernels of attention (kernels/attention/rows.h) are written for.
inline const std::vector<kern::Isa> kAttentionLevels = {kern::Isa::avx2, kern::Isa::avx512,
                                                        kern::Isa::avx512_bf16, kern::Isa::amx};

// Shapes that the kernels take: positive dimensions, f32 or bf16.
inline Support attention_support(spec::DType dtype, std::initializer_list<int64_t> dims,
                                 int64_t n_h = 1, int64_t n_kv = 1) {
  using State = Support::State;
  if (std::any_of(dims.begin(), dims.end(), [](int64_t d) { return d < 1; }) || n_h < 1 || n_kv < 1)
    return {State::unsupported, "dimensions must be >= 1"};
  if (n_h % n_kv != 0) return {State::unsupported, "n_h must be a multiple of n_kv"};
  if (dtype != spec::DType::f32 && dtype != spec::DType::bf16)
    return {State::unsupported, "f32 and bf16 only"};
  return {};
}

// In the emulation (about 0.3 GFLOP/s with tensor cores, an eighth of it without) the large cases would take minutes.
constexpr double kEmulatedFlop = 2.5e9;
inline Support cuda_work(double flop, Support otherwise) {
  const Support here = cuda_emulation_limit(flop, kEmulatedFlop);
  return here.state == Support::State::yes ? otherwise : here;
}

inline std::vector<float> floats_of(const HostTensor& t) {
  std::vector<float> r(static_cast<size_t>(t.numel()));
  const std::vector<double> d = t.to_doubles();
  std::transform(d.begin(), d.end(), r.begin(), [](double x) { return static_cast<float>(x); });
  return r;
}
inline void store_floats(const std::vector<float>& v, HostTensor& t) {
  if (t.dtype() == spec::DType::bf16) {
    std::transform(v.begin(), v.end(), t.as<spec::bf16>(),
                   [](float x) { return spec::to_bf16(x); });
  } else {
    std::copy(v.begin(), v.end(), t.as<float>());
  }
}

// What cuDNN, or its absence, says of a case.
inline Support cudnn_support(const std::string& refusal) {
  if (refusal.empty()) return {};
  return {Support::State::unsupported, refusal};
}

}  // namespace v3b::bench
