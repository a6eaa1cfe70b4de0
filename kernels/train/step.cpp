#include "kernels/train/step.h"

#include <chrono>

#include "kernels/gemm/gemm.h"
#include "kernels/train/step_make.h"
#include "model/rng.h"

namespace v3b::kern::train {

std::unique_ptr<TrainStep> make_train_step(const model::ModelConfig& c, Arithmetic arithmetic) {
  switch (arithmetic) {
    case Arithmetic::bf16:
      return make_step_bf16(c);
    case Arithmetic::f32:
      return make_step_f32(c);
    case Arithmetic::f64:
      return make_step_f64(c);
  }
  return nullptr;
}

void init_params(const ParamTable& table, double initializer_range, uint64_t seed,
                 std::span<float> values) {
  for (float& v : values) v = 0.0F;
  for (const Param& p : table.params) {
    const model::Rng rng{seed, model::rng_stream(p.name.c_str())};
#pragma omp parallel for schedule(static)
    for (int64_t i = 0; i < p.numel(); ++i) {
      values[static_cast<size_t>(p.offset + i)] =
          p.matrix ? static_cast<float>(initializer_range *
                                        model::rng_normal(rng, static_cast<uint64_t>(i)))
                   : 1.0F;
    }
  }
}

double measure_gemm_gflops(Arithmetic arithmetic) {
  constexpr int64_t n = 1024;
  const bool wide = arithmetic != Arithmetic::bf16;
  std::vector<float> a(n * n, 0.0F), c(n * n, 0.0F);  // zeros are valid bf16 too
  GemmArgs g;
  g.M = g.N = g.K = g.lda = g.ldb = g.ldc = n;
  g.a = g.b = a.data();
  g.c = c.data();
  g.ab_type = wide ? spec::DType::f32 : spec::DType::bf16;
  double best = 0;
  const auto start = std::chrono::steady_clock::now();
  const auto seconds = [](auto t) {
    return std::chrono::duration<double>(std::chrono::steady_clock::now() - t).count();
  };
  for (int i = 0; i < 3 || seconds(start) < 0.3; ++i) {
    const auto t = std::chrono::steady_clock::now();
    gemm(g);
    best = std::max(best, 2e-9 * static_cast<double>(n * n * n) / seconds(t));
  }
  return best;
}

void update_bias(std::vector<float>& bias, const std::vector<int64_t>& load, double u) {
  int64_t total = 0;
  for (int64_t v : load) total += v;
  const auto n = static_cast<int64_t>(load.size());
  for (size_t i = 0; i < load.size(); ++i) {
    const int64_t gap = total - load[i] * n;  // n * (mean - load)
    if (gap > 0) bias[i] += static_cast<float>(u);
    if (gap < 0) bias[i] -= static_cast<float>(u);
  }
}

}  // namespace v3b::kern::train
