// The training step of a V3-shaped model: loss, gradients of every parameter, AdamW. SPEC 1.2-1.18,
// 1.25, 1.27, 1.29, 3. Three arithmetics of one code: bf16 (bf16 GEMM operands, float32 elsewhere,
// float32 master weights), f32, and f64 (plain loops; the gradient check).
#pragma once
#include <cstdint>
#include <map>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "kernels/train/params.h"
#include "model/config.h"

namespace v3b::kern::train {

enum class Arithmetic { bf16, f32, f64 };
enum class AuxLoss { none, switch_loss, sequence };

struct LossOptions {
  double mtp_lambda = 0.3;      // weight of the MTP loss (SPEC 1.27)
  AuxLoss aux = AuxLoss::none;  // balance loss of every MoE layer, MTP's included
  double aux_alpha = 1e-4;
  bool aux_f_from_routing = false;  // flag balance_f
};
// tokens [B, S+1]: inputs 0..S-1, next-token targets 1..S. targets [B, S] (or null for tokens
// shifted) with -100 to ignore. The MTP row p (p < S-1) embeds tokens[p+1] and predicts
// target[p+1].
struct Batch {
  int64_t B = 0, S = 0;
  const int32_t* tokens = nullptr;
  const int32_t* targets = nullptr;
};
struct StepLosses {
  int64_t targets = 0, mtp_targets = 0;     // counted tokens
  double nats = 0, mtp_nats = 0;            // sums over counted tokens
  double aux = 0;                           // sum over layers, alpha included
  double total = 0;                         // nats/targets + lambda*mtp_nats/targets + aux
  int64_t mtp_agree = 0, mtp_compared = 0;  // MTP argmax == main argmax for the same token
  std::vector<std::vector<int64_t>> load;   // [MoE layer][E] assignments
};

struct AdamOptions {
  double lr = 1e-3, beta1 = 0.9, beta2 = 0.95, eps = 1e-8, weight_decay = 0.1, clip = 1.0;
};

class TrainStep {
 public:
  virtual ~TrainStep() = default;
  virtual const ParamTable& table() const = 0;
  // Master weights as float64 or float32 copies, [table().total].
  virtual void set_params(std::span<const float> values) = 0;
  virtual void get_params(std::span<float> values) const = 0;
  virtual void set_param(int64_t index, double value) = 0;  // one element (finite differences)
  virtual double get_param(int64_t index) const = 0;
  virtual double get_grad(int64_t index) const = 0;
  // Selection bias, [moe_layers][E].
  virtual std::vector<std::vector<float>>& bias() = 0;
  // Loss only, or with gradients (written, not added).
  virtual StepLosses run(const Batch& batch, const LossOptions& o, bool backward) = 0;
  // Clips by the global norm and applies AdamW with step number `t` (1-based); returns the norm
  // before clipping. A norm that is not finite leaves the weights alone.
  virtual double adamw(const AdamOptions& o, int64_t t) = 0;
  // Adam's first and second moment, [table().total] each, for checkpoints.
  virtual std::span<float> moment1() = 0;
  virtual std::span<float> moment2() = 0;
  // Seconds by phase since the last call (name -> seconds).
  virtual std::map<std::string, double> take_times() = 0;
};
// Throws v3b::Error for configurations that make_param_table rejects.
std::unique_ptr<TrainStep> make_train_step(const model::ModelConfig& c, Arithmetic arithmetic);

// N(0, initializer_range^2) for matrices, ones for norm weights; deterministic in seed.
void init_params(const ParamTable& table, double initializer_range, uint64_t seed,
                 std::span<float> values);

// Best rate of one large GEMM in the given arithmetic on all threads, GFLOP/s; takes about 0.3 s.
double measure_gemm_gflops(Arithmetic arithmetic);

// SPEC 1.18: b_i += u * sign(mean - c_i).
void update_bias(std::vector<float>& bias, const std::vector<int64_t>& load, double u);

}  // namespace v3b::kern::train
