// Expert weights of a case of moe_experts.
#pragma once
#include <array>
#include <cmath>
#include <cstdint>
#include <string>
#include <vector>

#include "bench/harness/host_tensor.h"
#include "bench/harness/op.h"
#include "reference/spec/moe_experts.h"

namespace v3b::bench {

// gate, up, down of all experts [E, rows, cols], of the shared one [1, rows, cols]; FP8 scales
// beside them.
struct MoeBank {
  std::array<HostTensor, 3> w, scale;
  int64_t E = 0, d = 0, m = 0;
  int64_t rows(int i) const { return i == 2 ? d : m; }
  int64_t cols(int i) const { return i == 2 ? m : d; }
  int64_t blocks(int i) const { return (rows(i) + 127) / 128 * ((cols(i) + 127) / 128); }
  bool fp8() const { return w[0].dtype() == spec::DType::f8e4m3; }
  spec::FfnPointers view(int64_t e) const {
    const void* p[3];
    const float* s[3] = {};
    for (int i = 0; i < 3; ++i) {
      p[i] = static_cast<const char*>(w[i].data()) +
             e * rows(i) * cols(i) * spec::dtype_bytes(w[i].dtype());
      if (fp8()) s[i] = scale[i].as<float>() + e * blocks(i);
    }
    return {p[0], p[1], p[2], s[0], s[1], s[2]};
  }
  // One matrix of one expert, dequantised.
  template <class S>
  std::vector<S> values(int i, int64_t e) const {
    std::vector<S> out;
    values(i, e, out);
    return out;
  }
  // The same into a vector that goes from expert to expert: fresh pages take longer than the values.
  template <class S>
  void values(int i, int64_t e, std::vector<S>& out) const {
    const int64_t r = rows(i), c = cols(i);
    out.resize(static_cast<size_t>(r * c));
#pragma omp parallel for schedule(static)
    for (int64_t y = 0; y < r; ++y) {
      std::vector<double> row(static_cast<size_t>(c));
      w[i].read((e * r + y) * c, c, row.data());
      const float* s =
          fp8() ? scale[i].as<float>() + e * blocks(i) + y / 128 * ((c + 127) / 128) : nullptr;
      for (int64_t x = 0; x < c; ++x)
        out[size_t(y * c + x)] =
            static_cast<S>(s == nullptr ? row[x] : row[x] * double(s[x / 128]));
    }
  }

  static MoeBank make(const spec::MoeExpertsShape& s, const char* which, int64_t E, int64_t m,
                      uint64_t seed) {
    MoeBank b;
    b.E = E, b.d = s.d, b.m = m;
    const char* part[3] = {"gate", "up", "down"};
    for (int i = 0; i < 3; ++i) {
      const std::string n = std::string(which) + part[i];
      const double std = 1 / std::sqrt(double(b.cols(i)));
      const bool fp8 = s.w_dtype == spec::DType::f8e4m3;
      b.w[i] = HostTensor(n, Role::input, s.w_dtype, {E, b.rows(i), b.cols(i)});
      b.w[i].fill_real(seed + uint64_t(i), fp8 ? 64.0 : std, false);
      if (!fp8) continue;
      b.scale[i] = HostTensor(n + "_scale", Role::input, spec::DType::f32, {E, b.blocks(i)});
      b.scale[i].fill_real(seed + 10 + uint64_t(i), 0.3, false);
      for (int64_t j = 0; j < b.scale[i].numel(); ++j)
        b.scale[i].set(j, std / 64 * std::exp(b.scale[i].get(j)));  // positive, of various sizes
    }
    return b;
  }
};

}  // namespace v3b::bench
