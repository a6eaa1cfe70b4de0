// TrainStep for one pair of types; instantiated in step_bf16.cpp, step_f32.cpp and step_f64.cpp. A
// batch is worked through in parts, one thread each, that meet once a step, when their gradients
// are added: on a busy machine a barrier after every operation costs more than the copies of
// gradients.
#pragma once
#include "kernels/core/cpu.h"
#include "kernels/train/head.h"
#include "kernels/train/layer.h"
#include "model/rope_table.h"

namespace v3b::kern::train {

// What all workers read.
template <class R, class X>
struct Shared {
  model::ModelConfig c;
  ParamTable table;
  Buffer<R> w;
  Buffer<X> wx;  // GEMM operands; unused when X is R
  std::vector<std::vector<float>> bias;
  Buffer<R> cos, sin;  // [rope_positions, d_r/2]
  int64_t rope_positions = 0;
  double scale = 1;

  const X* operands() const {
    if constexpr (std::is_same_v<R, X>) {
      return w.data();
    } else {
      return wx.data();
    }
  }
  void refresh() {
    if constexpr (!std::is_same_v<R, X>) convert_rows(w.data(), wx.data(), table.total);
  }
  void build_rope(int64_t S) {
    const int64_t half = c.qk_rope_head_dim / 2;
    if (rope_positions == S) return;
    const model::RopeFreqs f = model::rope_freqs(c, {}, S);
    scale = f.softmax_scale;
    cos.reserve_discard(S * half), sin.reserve_discard(S * half);
    for (int64_t p = 0; p < S; ++p) {
      for (int64_t i = 0; i < half; ++i) {
        const double angle = static_cast<double>(p) * f.inv_freq[static_cast<size_t>(i)];
        cos[p * half + i] = static_cast<R>(std::cos(angle) * f.cos_sin_multiplier);
        sin[p * half + i] = static_cast<R>(std::sin(angle) * f.cos_sin_multiplier);
      }
    }
    rope_positions = S;
  }
};

// Forward and backward of some sequences: activations, scratch and gradients of its own.
template <class R, class X>
class Worker {
 public:
  explicit Worker(const Shared<R, X>& shared)
      : sh_(shared), c_(shared.c), table_(shared.table), w_(shared.w), bias_(shared.bias) {
    acts_.resize(table_.layers.size());
    h_.resize(table_.layers.size() + 1);
  }
  // main_targets: targets of the whole batch, which the mean losses are divided by.
  // grads [table.total] are written, null: loss only.
  StepLosses run(const Batch& b, const LossOptions& o, int64_t main_targets, R* grads);
  PhaseTimer& timer() { return timer_; }

 private:
  void embed(int64_t B, int64_t S, int64_t S_in, int64_t shift, const int32_t* tokens,
             R* out) const {
    const int64_t d = c_.hidden_size;
    const R* table = w_.data() + table_.embed;
#pragma omp parallel for schedule(static)
    for (int64_t i = 0; i < B * S; ++i) {
      const int64_t id = tokens[i / S * S_in + i % S + shift];
      for (int64_t j = 0; j < d; ++j) out[i * d + j] = rounded(table[id * d + j]);
    }
  }
  // The embedding row as the model will store it.
  static R rounded(R v) {
    if constexpr (std::is_same_v<R, X>) {
      return v;
    } else {
      return ld(st<X>(v));
    }
  }
  // Two halves of the columns, rows in order: the same sum for any number of threads.
  void embed_bwd(int64_t B, int64_t S, int64_t S_in, int64_t shift, const int32_t* tokens,
                 const R* dy, int64_t ld) {
    const int64_t d = c_.hidden_size;
    R* g = g_ + table_.embed;
    constexpr int64_t kCols = 64;
#pragma omp parallel for schedule(static)
    for (int64_t j0 = 0; j0 < d; j0 += kCols) {
      const int64_t j1 = std::min(d, j0 + kCols);
      for (int64_t i = 0; i < B * S; ++i) {
        const int64_t id = tokens[i / S * S_in + i % S + shift];
        for (int64_t j = j0; j < j1; ++j) g[id * d + j] += dy[i * ld + j];
      }
    }
  }
  void mtp(const Net<R, X>& n, const Batch& b, const std::vector<int32_t>& targets,
           int64_t main_targets, bool backward, StepLosses& out);

  const Shared<R, X>& sh_;
  const model::ModelConfig& c_;
  const ParamTable& table_;
  const Buffer<R>& w_;
  const std::vector<std::vector<float>>& bias_;
  R* g_ = nullptr;
  std::vector<LayerActs<R, X>> acts_;
  std::vector<Buffer<R>> h_;  // input of every layer; [L] the trunk's output
  Buffer<R> hf_, dhf_, dh_, mh_, mout_, me_, du_, rstd_f_, rstd_m_, rstd_e_, rstd_h_;
  Buffer<X> xf_, xm_, u_;
  Buffer<int32_t> argmax_main_, argmax_mtp_;
  Scratch<R, X> scratch_;
  HeadScratch<R, X> head_;
  PhaseTimer timer_;
};

template <class R, class X>
StepLosses Worker<R, X>::run(const Batch& b, const LossOptions& o, int64_t main_targets, R* grads) {
  const bool backward = grads != nullptr;
  g_ = grads;
  const int64_t B = b.B, S = b.S, N = B * S, d = c_.hidden_size, V = c_.vocab_size;
  const int64_t L = c_.num_hidden_layers;
  scratch_.threads(num_threads());
  timer_.start();
  RouterDims router{c_.n_routed_experts, c_.num_experts_per_tok,   c_.n_group,
                    c_.topk_group,       c_.routed_scaling_factor, c_.norm_topk_prob};
  const Net<R, X> n{
      &c_,    w_.data(), sh_.operands(), g_,     sh_.cos.data(), sh_.sin.data(), sh_.scale,
      router, o,         &scratch_,      &timer_};
  StepLosses out;
  out.load.resize(static_cast<size_t>(table_.moe_layers));
  std::vector<int32_t> targets(static_cast<size_t>(N));
  for (int64_t i = 0; i < N; ++i) {
    const int32_t y = b.targets != nullptr ? b.targets[i] : b.tokens[i / S * (S + 1) + i % S + 1];
    targets[static_cast<size_t>(i)] = y < 0 ? -100 : y;
    if (y >= 0) ++out.targets;
  }
  for (int64_t l = 0; l <= L; ++l) h_[static_cast<size_t>(l)].reserve_discard(N * d);
  embed(B, S, S + 1, 0, b.tokens, h_[0].data());
  if (backward) {
#pragma omp parallel for schedule(static)
    for (int64_t i = 0; i < table_.total; i += 64) std::fill(g_ + i, g_ + i + 64, R(0));
  }
  timer_.lap("embed");
  for (int64_t l = 0; l < L; ++l) {
    const auto s = static_cast<size_t>(l);
    const LayerRef& ref = table_.layers[s];
    const float* bias = ref.moe ? bias_[static_cast<size_t>(ref.moe_index)].data() : nullptr;
    layer_fwd(n, ref, B, S, static_cast<const R*>(h_[s].data()), bias, acts_[s], h_[s + 1].data(),
              &out.aux);
    if (ref.moe) out.load[static_cast<size_t>(ref.moe_index)] = acts_[s].moe.counts;
  }
  hf_.reserve_discard(N * d), xf_.reserve_discard(N * d), rstd_f_.reserve_discard(N);
  const R* trunk = h_[static_cast<size_t>(L)].data();
  rmsnorm_fwd(N, d, trunk, d, n.w + table_.norm, c_.rms_norm_eps, xf_.data(), d, rstd_f_.data(),
              hf_.data());
  if (backward) dhf_.reserve_discard(N * d);
  argmax_main_.reserve_discard(N), argmax_mtp_.reserve_discard(N);
  timer_.lap("norm");
  const double per_target = 1.0 / static_cast<double>(std::max<int64_t>(main_targets, 1));
  out.nats = head_loss(N, d, V, xf_.data(), n.wx + table_.lm_head, targets.data(), per_target,
                       backward ? nullptr : argmax_main_.data(), backward ? dhf_.data() : nullptr,
                       n.g + table_.lm_head, head_);
  timer_.lap("head");
  if (table_.mtp && S > 1) mtp(n, b, targets, main_targets, backward, out);
  if (!backward) return out;
  dh_.reserve_discard(N * d);
  rmsnorm_bwd(N, d, dhf_.data(), d, trunk, d, n.w + table_.norm, rstd_f_.data(),
              static_cast<const R*>(nullptr), dh_.data(), d, n.g + table_.norm, scratch_.partial);
  timer_.lap("norm");
  for (int64_t l = L - 1; l >= 0; --l) {
    const auto s = static_cast<size_t>(l);
    layer_bwd(n, table_.layers[s], B, S, static_cast<const R*>(h_[s].data()), acts_[s], dh_.data());
  }
  embed_bwd(B, S, S + 1, 0, b.tokens, dh_.data(), d);
  timer_.lap("embed");
  return out;
}

template <class R, class X>
void Worker<R, X>::mtp(const Net<R, X>& n, const Batch& b, const std::vector<int32_t>& targets,
                       int64_t main_targets, bool backward, StepLosses& out) {
  const int64_t B = b.B, S = b.S, S1 = S - 1, N = B * S1, d = c_.hidden_size, V = c_.vocab_size;
  me_.reserve_discard(N * d), mh_.reserve_discard(N * d), mout_.reserve_discard(N * d);
  u_.reserve_discard(N * 2 * d), xm_.reserve_discard(N * d);
  rstd_e_.reserve_discard(N), rstd_h_.reserve_discard(N), rstd_m_.reserve_discard(N);
  Buffer<R>& hrow = h_.back();  // [N,d] trunk states of the MTP rows
  hrow.reserve_discard(N * d);
  std::vector<int32_t> t2(static_cast<size_t>(N));
  for (int64_t i = 0; i < N; ++i) {
    t2[static_cast<size_t>(i)] = targets[static_cast<size_t>(i / S1 * S + i % S1 + 1)];
    if (t2[static_cast<size_t>(i)] >= 0) ++out.mtp_targets;
  }
  embed(B, S1, S + 1, 1, b.tokens, me_.data());
#pragma omp parallel for schedule(static)
  for (int64_t i = 0; i < N; ++i) {
    std::copy_n(hf_.data() + (i / S1 * S + i % S1) * d, d, hrow.data() + i * d);
  }
  rmsnorm_fwd(N, d, me_.data(), d, n.w + table_.enorm, c_.rms_norm_eps, u_.data(), 2 * d,
              rstd_e_.data());
  rmsnorm_fwd(N, d, hrow.data(), d, n.w + table_.hnorm, c_.rms_norm_eps, u_.data() + d, 2 * d,
              rstd_h_.data());
  mm_fwd(N, d, 2 * d, u_.data(), n.wx + table_.eh_proj, mh_.data());
  timer_.lap("mtp_in");
  const LayerRef& ref = table_.layers.back();
  LayerActs<R, X>& A = acts_.back();
  const float* bias = ref.moe ? bias_[static_cast<size_t>(ref.moe_index)].data() : nullptr;
  layer_fwd(n, ref, B, S1, static_cast<const R*>(mh_.data()), bias, A, mout_.data(), &out.aux);
  if (ref.moe) out.load[static_cast<size_t>(ref.moe_index)] = A.moe.counts;
  rmsnorm_fwd(N, d, mout_.data(), d, n.w + table_.head_norm, c_.rms_norm_eps, xm_.data(), d,
              rstd_m_.data());
  timer_.lap("norm");
  if (backward) du_.reserve_discard(N * 2 * d);
  const double weight = n.loss.mtp_lambda / static_cast<double>(std::max<int64_t>(main_targets, 1));
  out.mtp_nats = head_loss(N, d, V, xm_.data(), n.wx + table_.lm_head, t2.data(), weight,
                           backward ? nullptr : argmax_mtp_.data(), backward ? du_.data() : nullptr,
                           n.g + table_.lm_head, head_);
  timer_.lap("head");
  if (!backward) {
    for (int64_t i = 0; i < N; ++i) {
      if (t2[static_cast<size_t>(i)] < 0) continue;
      ++out.mtp_compared;
      if (argmax_mtp_[i] == argmax_main_[i / S1 * S + i % S1 + 1]) ++out.mtp_agree;
    }
    return;
  }
  dh_.reserve_discard(B * S * d);
  const R* none = nullptr;
  rmsnorm_bwd(N, d, du_.data(), d, mout_.data(), d, n.w + table_.head_norm, rstd_m_.data(), none,
              dh_.data(), d, n.g + table_.head_norm, scratch_.partial);
  timer_.lap("norm");
  layer_bwd(n, ref, B, S1, static_cast<const R*>(mh_.data()), A, dh_.data());
  scratch_.x.reserve_discard(N * d);
  convert_rows(dh_.data(), scratch_.x.data(), N * d);
  mm_dw(N, d, 2 * d, scratch_.x.data(), u_.data(), n.g + table_.eh_proj);
  mm_dx(N, d, 2 * d, scratch_.x.data(), n.wx + table_.eh_proj, du_.data());
  rmsnorm_bwd(N, d, du_.data(), 2 * d, me_.data(), d, n.w + table_.enorm, rstd_e_.data(), none,
              me_.data(), d, n.g + table_.enorm, scratch_.partial);
  embed_bwd(B, S1, S + 1, 1, b.tokens, me_.data(), d);
  rmsnorm_bwd(N, d, du_.data() + d, 2 * d, hrow.data(), d, n.w + table_.hnorm, rstd_h_.data(), none,
              hrow.data(), d, n.g + table_.hnorm, scratch_.partial);
#pragma omp parallel for schedule(static)
  for (int64_t i = 0; i < N; ++i) {
    R* o = dhf_.data() + (i / S1 * S + i % S1) * d;
    for (int64_t j = 0; j < d; ++j) o[j] += hrow[i * d + j];
  }
  timer_.lap("mtp_in");
}

inline constexpr int64_t kParts = 4;  // of a batch; more: finer sharing, more gradient copies

template <class R, class X>
class StepImpl final : public TrainStep {
 public:
  explicit StepImpl(const model::ModelConfig& c) {
    sh_.c = c;
    sh_.table = make_param_table(c);
    const ParamTable& t = sh_.table;
    sh_.w = Buffer<R>(t.total);
    m_ = Buffer<float>(t.total);
    v_ = Buffer<float>(t.total);
    if constexpr (!std::is_same_v<R, X>) sh_.wx = Buffer<X>(t.total);
    decay_.assign(static_cast<size_t>(t.total / 32), 0);
    for (const Param& p : t.params) {
      if (!p.matrix) continue;
      for (int64_t i = p.offset / 32; i < (p.offset + p.numel() + 31) / 32; ++i) {
        decay_[static_cast<size_t>(i)] = 1;
      }
    }
    sh_.bias.assign(static_cast<size_t>(t.moe_layers),
                    std::vector<float>(static_cast<size_t>(c.n_routed_experts), 0.0F));
  }
  const ParamTable& table() const override { return sh_.table; }
  void set_params(std::span<const float> values) override {
    for (int64_t i = 0; i < sh_.table.total; ++i) sh_.w[i] = values[static_cast<size_t>(i)];
    sh_.refresh();
  }
  void get_params(std::span<float> values) const override {
    for (int64_t i = 0; i < sh_.table.total; ++i) {
      values[static_cast<size_t>(i)] = static_cast<float>(sh_.w[i]);
    }
  }
  void set_param(int64_t i, double value) override {
    sh_.w[i] = static_cast<R>(value);
    if constexpr (!std::is_same_v<R, X>) sh_.wx[i] = st<X>(sh_.w[i]);
  }
  double get_param(int64_t i) const override { return static_cast<double>(sh_.w[i]); }
  double get_grad(int64_t i) const override { return static_cast<double>(grads()[i]); }
  std::vector<std::vector<float>>& bias() override { return sh_.bias; }
  std::span<float> moment1() override { return {m_.data(), static_cast<size_t>(m_.size())}; }
  std::span<float> moment2() override { return {v_.data(), static_cast<size_t>(v_.size())}; }
  std::map<std::string, double> take_times() override {
    std::map<std::string, double> sum = std::exchange(timer_.seconds, {});
    for (auto& w : workers_) {
      for (const auto& [k, v] : std::exchange(w->timer().seconds, {})) {
        sum[k] += v / static_cast<double>(workers_.size());
      }
    }
    return sum;
  }
  StepLosses run(const Batch& b, const LossOptions& o, bool backward) override;
  double adamw(const AdamOptions& o, int64_t t) override;

 private:
  const R* grads() const { return g_.front().data(); }
  Shared<R, X> sh_;
  std::vector<std::unique_ptr<Worker<R, X>>> workers_;
  std::vector<Buffer<R>> g_;  // gradients of each part of the batch; the first becomes the sum
  Buffer<float> m_, v_;
  std::vector<uint8_t> decay_;  // one flag for 32 elements
  PhaseTimer timer_;
};

template <class R, class X>
StepLosses StepImpl<R, X>::run(const Batch& b, const LossOptions& o, bool backward) {
  sh_.build_rope(b.S);
  StepLosses out;
  for (int64_t i = 0; i < b.B * b.S; ++i) {
    const int32_t y =
        b.targets != nullptr ? b.targets[i] : b.tokens[i / b.S * (b.S + 1) + i % b.S + 1];
    if (y >= 0) ++out.targets;
  }
  // The Switch loss wants the load of the whole batch: one part, its loops on all threads. Else the
  // batch is cut into parts that do not depend on the number of threads; free workers take them,
  // and their gradients are added in order.
  const bool together = o.aux == AuxLoss::switch_loss || std::is_same_v<R, double>;
  const int64_t n = together ? 1 : std::min(kParts, b.B);
  const int64_t threads = std::min<int64_t>(num_threads(), n);
  while (static_cast<int64_t>(workers_.size()) < threads) {
    workers_.push_back(std::make_unique<Worker<R, X>>(sh_));
  }
  while (backward && static_cast<int64_t>(g_.size()) < n) g_.emplace_back(sh_.table.total);
  std::vector<StepLosses> part(static_cast<size_t>(n));
  const auto work = [&](int64_t i, size_t worker) {
    const int64_t lo = b.B * i / n, hi = b.B * (i + 1) / n;
    const Batch mine{hi - lo, b.S, b.tokens + lo * (b.S + 1),
                     b.targets != nullptr ? b.targets + lo * b.S : nullptr};
    LossOptions mo = o;  // the sequence loss is a mean over the batch's sequences
    mo.aux_alpha = o.aux_alpha * static_cast<double>(hi - lo) / static_cast<double>(b.B);
    part[static_cast<size_t>(i)] = workers_[worker]->run(
        mine, mo, out.targets, backward ? g_[static_cast<size_t>(i)].data() : nullptr);
  };
  if (threads == 1) {
    for (int64_t i = 0; i < n; ++i) work(i, 0);
  } else {
#pragma omp parallel for schedule(dynamic, 1) num_threads(static_cast <int>(threads))
    for (int64_t i = 0; i < n; ++i) work(i, static_cast<size_t>(omp_get_thread_num()));
  }
  timer_.start();
  if (backward && n > 1) {
    R* g = g_.front().data();
#pragma omp parallel for schedule(static)
    for (int64_t i0 = 0; i0 < sh_.table.total; i0 += 64) {
      for (int64_t k = 1; k < n; ++k) {
        const R* other = g_[static_cast<size_t>(k)].data();
#pragma omp simd
        for (int64_t i = i0; i < i0 + 64; ++i) g[i] += other[i];
      }
    }
  }
  out.load.assign(static_cast<size_t>(sh_.table.moe_layers),
                  std::vector<int64_t>(static_cast<size_t>(sh_.c.n_routed_experts), 0));
  for (const StepLosses& p : part) {
    out.nats += p.nats, out.mtp_nats += p.mtp_nats, out.aux += p.aux;
    out.mtp_targets += p.mtp_targets;
    out.mtp_agree += p.mtp_agree, out.mtp_compared += p.mtp_compared;
    for (size_t l = 0; l < p.load.size(); ++l) {
      for (size_t e = 0; e < p.load[l].size(); ++e) out.load[l][e] += p.load[l][e];
    }
  }
  out.total = (out.nats + o.mtp_lambda * out.mtp_nats) /
                  static_cast<double>(std::max<int64_t>(out.targets, 1)) +
              out.aux;
  timer_.lap("reduce");
  return out;
}

template <class R, class X>
double StepImpl<R, X>::adamw(const AdamOptions& o, int64_t t) {
  timer_.start();
  const R* g = grads();
  constexpr int64_t kBlock = 32 * 512;
  const int64_t blocks = (sh_.table.total + kBlock - 1) / kBlock;
  std::vector<double> part(static_cast<size_t>(blocks));
#pragma omp parallel for schedule(static)
  for (int64_t b = 0; b < blocks; ++b) {
    double sum = 0;
    const int64_t hi = std::min(sh_.table.total, (b + 1) * kBlock);
    for (int64_t i0 = b * kBlock; i0 < hi; i0 += 32) {
      R s = 0;
#pragma omp simd reduction(+ : s)
      for (int64_t i = i0; i < i0 + 32; ++i) s += g[i] * g[i];
      sum += static_cast<double>(s);
    }
    part[static_cast<size_t>(b)] = sum;
  }
  double norm = 0;
  for (double v : part) norm += v;
  norm = std::sqrt(norm);
  if (!std::isfinite(norm)) return norm;
  const float clip = static_cast<float>(norm > o.clip && o.clip > 0 ? o.clip / norm : 1.0);
  const auto td = static_cast<double>(t);
  const auto b1 = static_cast<float>(o.beta1), b2 = static_cast<float>(o.beta2);
  const auto c1 = static_cast<float>(1.0 / (1.0 - std::pow(o.beta1, td)));
  const auto c2 = static_cast<float>(1.0 / (1.0 - std::pow(o.beta2, td)));
  const auto lr = static_cast<float>(o.lr), eps = static_cast<float>(o.eps);
  R* w = sh_.w.data();
  float *m = m_.data(), *v = v_.data();
#pragma omp parallel for schedule(static)
  for (int64_t blk = 0; blk < sh_.table.total / 32; ++blk) {
    const float wd =
        decay_[static_cast<size_t>(blk)] != 0 ? static_cast<float>(o.weight_decay) : 0.0F;
#pragma omp simd
    for (int64_t i = blk * 32; i < blk * 32 + 32; ++i) {
      const float gi = static_cast<float>(g[i]) * clip;
      m[i] = b1 * m[i] + (1.0F - b1) * gi;
      v[i] = b2 * v[i] + (1.0F - b2) * gi * gi;
      const float step = m[i] * c1 / (std::sqrt(v[i] * c2) + eps) + wd * static_cast<float>(w[i]);
      w[i] -= static_cast<R>(lr * step);
    }
  }
  sh_.refresh();
  timer_.lap("adamw");
  return norm;
}

}  // namespace v3b::kern::train
