// Frequencies, cos/sin multiplier and softmax scale for every context extension of SPEC 1.3-1.4.
// Plain arithmetic shared by reference and kernels ("RoPE from given tables"); proven against
// transformers' tables and SPEC Appendix A in tests/test_rope_table.cpp.
#pragma once
#include <cstdint>
#include <vector>

#include "model/config.h"
#include "reference/spec/flags.h"

namespace v3b::model {

struct RopeFreqs {
  std::vector<double> inv_freq;   // [d_r/2] float64
  double cos_sin_multiplier = 1;  // YaRN attention factor on cos and sin (1 for V3, SPEC 1.4.6)
  double softmax_scale = 0;       // d_qk^(-1/2) * get(s, mscale_all_dim)^2
};
// `context`: current length l (dynamic NTK, yarn_when); others ignore it.
RopeFreqs rope_freqs(const ModelConfig& c, const spec::Flags& flags, int64_t context);

struct RopeTable {
  int64_t positions = 0, half = 0;
  std::vector<float> cos,
      sin;  // [positions, d_r/2], built in float64, rounded once, multiplier included
};
RopeTable make_rope_table(const RopeFreqs& f, int64_t first_position, int64_t positions);

double yarn_get_mscale(double s, double a);  // 1 if s <= 1 else 0.1*a*ln(s)+1

}  // namespace v3b::model
