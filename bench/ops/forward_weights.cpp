#include "bench/ops/forward_weights.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "bench/harness/check.h"
#include "bench/harness/host_tensor.h"
#include "bench/harness/shape_io.h"
#include "model/error.h"
#include "model/params.h"
#include "model/rng.h"

namespace v3b::bench {
namespace {

constexpr int64_t kClasses = 16;
constexpr double kClassWeight = 3;  // of the class vector in an embedding of unit variance
constexpr double kLogit = 6;        // router logits aim at +-kLogit times the class vector's share
constexpr uint64_t kModelSeed = 77;
// Of the free memory, what the weights and one packed form of them may take.
constexpr double kFreeShare = 0.85, kForms = 2;

double normal(const char* stream, uint64_t i) {
  return model::rng_normal({kModelSeed, model::rng_stream(stream)}, i);
}

// [kClasses, d] unit vectors.
std::vector<float> class_vectors(int64_t d) {
  std::vector<float> u(size_t(kClasses * d));
  for (int64_t c = 0; c < kClasses; ++c) {
    double n = 0;
    for (int64_t i = 0; i < d; ++i) {
      u[size_t(c * d + i)] = float(normal("class", uint64_t(c * d + i)));
      n += double(u[size_t(c * d + i)]) * u[size_t(c * d + i)];
    }
    for (int64_t i = 0; i < d; ++i)
      u[size_t(c * d + i)] = float(u[size_t(c * d + i)] / std::sqrt(n));
  }
  return u;
}

// Experts of a class: K of them, K/M (rounded up) in each of M groups, everything shifted from
// class to class.
bool chosen(const spec::ForwardShape& s, int64_t c, int64_t e) {
  const int64_t per_group = s.E / s.G, each = (s.K + s.M - 1) / s.M;
  const int64_t g = e / per_group, rank = ((g - c) % s.G + s.G) % s.G;
  if (rank >= s.M) return false;
  const int64_t in_group = ((e % per_group - c / s.G * each) % per_group + per_group) % per_group;
  return in_group < std::min(each, s.K - rank * each);
}

// Router rows that answer the given class vectors.
std::vector<float> router_rows(const spec::ForwardShape& s, const std::vector<float>& u) {
  std::vector<float> gate(size_t(s.E * s.d), 0.0F);
  for (int64_t e = 0; e < s.E; ++e)
    for (int64_t c = 0; c < kClasses; ++c)
      for (int64_t i = 0; i < s.d; ++i)
        gate[size_t(e * s.d + i)] +=
            float((chosen(s, c, e) ? kLogit : -kLogit) / std::sqrt(double(s.d))) *
            u[size_t(c * s.d + i)];
  return gate;
}

// Writes over a matrix of fast_random_weights, whose storage is this file's own.
void overwrite(const model::TensorView& t, const std::vector<float>& values) {
  auto* bits = static_cast<uint16_t*>(const_cast<void*>(t.data));
  for (size_t i = 0; i < values.size(); ++i) bits[i] = spec::to_bf16(values[i]).bits;
}

// N(0,1) rows get their class vector.
void add_classes(const spec::ForwardShape& s, const model::TensorView& embed,
                 const std::vector<float>& u) {
  auto* bits = static_cast<uint16_t*>(const_cast<void*>(embed.data));
  const float weight = float(kClassWeight * std::sqrt(double(s.d)));
#pragma omp parallel for schedule(static)
  for (int64_t v = 0; v < s.V; ++v)
    for (int64_t i = 0; i < s.d; ++i) {
      uint16_t& b = bits[v * s.d + i];
      b = spec::to_bf16(spec::to_float(spec::bf16{b}) + weight * u[size_t(v % kClasses * s.d + i)])
              .bits;
    }
}

// The MTP layer sees the class vector of its embedding through the left half of eh_proj.
std::vector<float> through_eh(const spec::ForwardShape& s, const std::vector<float>& u,
                              const std::vector<float>& eh) {
  std::vector<float> u2(u.size(), 0.0F);
  for (int64_t k = 0; k < kClasses; ++k) {
    double n = 0;
    for (int64_t r = 0; r < s.d; ++r) {
      double sum = 0;
      for (int64_t i = 0; i < s.d; ++i)
        sum += double(eh[size_t(r * 2 * s.d + i)]) * u[size_t(k * s.d + i)];
      u2[size_t(k * s.d + r)] = float(sum);
      n += sum * sum;
    }
    for (int64_t r = 0; r < s.d; ++r)
      u2[size_t(k * s.d + r)] = float(u2[size_t(k * s.d + r)] / std::sqrt(n));
  }
  return u2;
}

model::WeightsPtr steered_weights(const spec::ForwardShape& s, bool mtp) {
  const double bytes = kForms * forward_weight_count(s, mtp) * double(spec::dtype_bytes(s.w_dtype)),
               have = double(available_memory_bytes());
  if (have > 0 && bytes > kFreeShare * have)
    throw TooLarge("the weights and their packed form take " +
                   std::to_string(int64_t(bytes / 1e9)) + " GB, " +
                   std::to_string(int64_t(have / 1e9)) + " GB are free");
  const model::WeightsPtr w =
      model::fast_random_weights(forward_config(s, mtp), kModelSeed, s.w_dtype);
  const std::vector<float> u = class_vectors(s.d), gate = router_rows(s, u);
  add_classes(s, w->embed_tokens, u);
  for (int64_t l = s.L_d; l < s.L; ++l) overwrite(w->layers[size_t(l)].moe.gate, gate);
  if (mtp) {
    const std::vector<float> eh = model::to_float_vector(w->mtp[0].eh_proj);
    overwrite(w->mtp[0].layer.moe.gate, router_rows(s, through_eh(s, u, eh)));
  }
  return w;
}

std::string shipped_dir() { return model::model_dir() + "/tiny-v3"; }

model::ModelConfig shipped_config(const spec::ForwardShape& s) {
  model::ModelConfig c = model::load_config(shipped_dir());
  const std::array<std::pair<int64_t, int64_t>, 17> same = {{{s.L, c.num_hidden_layers},
                                                             {s.L_d, c.first_k_dense_replace},
                                                             {s.d, c.hidden_size},
                                                             {s.n_h, c.num_attention_heads},
                                                             {s.d_n, c.qk_nope_head_dim},
                                                             {s.d_r, c.qk_rope_head_dim},
                                                             {s.d_v, c.v_head_dim},
                                                             {s.d_q, c.q_lora_rank},
                                                             {s.d_c, c.kv_lora_rank},
                                                             {s.f, c.intermediate_size},
                                                             {s.m, c.moe_intermediate_size},
                                                             {s.E, c.n_routed_experts},
                                                             {s.N_s, c.n_shared_experts},
                                                             {s.K, c.num_experts_per_tok},
                                                             {s.G, c.n_group},
                                                             {s.M, c.topk_group},
                                                             {s.V, c.vocab_size}}};
  for (const auto& [given, has] : same)
    if (given != has)
      throw Error(ExitCode::usage, "weights=tiny_v3 needs the shipped model's sizes",
                  "--case of a forward op", std::to_string(has), std::to_string(given));
  c.max_position_embeddings = std::max(c.max_position_embeddings, s.s0 + s.T + 1);
  return c;
}

}  // namespace

model::ModelConfig forward_config(const spec::ForwardShape& s, bool mtp) {
  if (s.weights == spec::ForwardWeights::tiny_v3) return shipped_config(s);
  model::ModelConfig c;
  c.vocab_size = s.V;
  c.hidden_size = s.d;
  c.intermediate_size = s.f;
  c.moe_intermediate_size = s.m;
  c.num_hidden_layers = s.L;
  c.num_nextn_predict_layers = mtp ? 1 : 0;
  c.num_attention_heads = s.n_h;
  c.n_shared_experts = s.N_s;
  c.n_routed_experts = s.E;
  c.num_experts_per_tok = s.K;
  c.n_group = s.G;
  c.topk_group = s.M;
  c.routed_scaling_factor = 2.5;
  c.kv_lora_rank = s.d_c;
  c.q_lora_rank = s.d_q;
  c.qk_nope_head_dim = s.d_n;
  c.qk_rope_head_dim = s.d_r;
  c.v_head_dim = s.d_v;
  c.first_k_dense_replace = s.L_d;
  c.max_position_embeddings = std::max<int64_t>(4096, s.s0 + s.T + 1);
  model::validate_config(c, "--case of a forward op");
  return c;
}

double forward_weight_count(const spec::ForwardShape& s, bool mtp) {
  // In doubles: nothing of any size may overflow.
  const double d = double(s.d), heads = double(s.n_h);
  const double attention =
      d * double(s.d_c + s.d_r) + heads * double(s.d_n + s.d_v) * double(s.d_c) +
      heads * double(s.d_v) * d + heads * double(s.d_n + s.d_r) * (s.d_q > 0 ? double(s.d_q) : d) +
      double(s.d_q) * d;
  const double moe = d * double(s.E) + 3 * d * double(s.m) * (double(s.E) + double(s.N_s)),
               dense = 3 * d * double(s.f), sparse = double(s.L - s.L_d) + (mtp ? 1 : 0);
  return double(s.L + (mtp ? 1 : 0)) * attention + double(s.L_d) * dense + sparse * moe +
         2 * double(s.V) * d + (mtp ? 2 * d * d : 0);
}

model::WeightsPtr forward_weights(const spec::ForwardShape& s, bool mtp) {
  static std::mutex mutex;
  static std::weak_ptr<const model::ModelWeights> kept;
  static std::string kept_key;
  spec::ForwardShape model = s;  // what the weights depend on
  model.B = model.T = 1, model.s0 = 0;
  model.dtype = spec::DType::bf16, model.kv_format = spec::KvFormat::bf16;
  const std::string key = shape_to_text(model) + (mtp ? "+mtp" : "");
  const std::lock_guard lock(mutex);
  model::WeightsPtr w = key == kept_key ? kept.lock() : nullptr;
  if (w == nullptr) {
    w = s.weights == spec::ForwardWeights::tiny_v3 ? model::load_weights(shipped_dir())
                                                   : steered_weights(s, mtp);
    kept = w, kept_key = key;
  }
  return w;
}

model::CacheRows forward_rows(const spec::ForwardShape& s, uint64_t seed, int64_t b) {
  constexpr int kLevels = 4096;
  static const std::vector<float> level = [] {
    std::vector<float> v(kLevels);
    for (int i = 0; i < kLevels; ++i)
      v[size_t(i)] = spec::to_float(
          spec::to_bf16(float(model::rng_normal_quantile((i + 0.5) / double(kLevels)))));
    return v;
  }();
  return [n = s.s0, d_c = s.d_c, d_r = s.d_r, seed, b](int64_t layer, float* c, float* k) {
    const auto fill = [&](float* to, int64_t width, uint64_t what) {
      const model::Rng rng{seed, model::rng_mix(uint64_t(b) << 32 | uint64_t(layer) << 1 | what)};
#pragma omp parallel for schedule(static)
      for (int64_t t = 0; t < n; ++t) {
        const float gain = model::rng_u64({seed, rng.stream ^ 1}, uint64_t(t)) % 16 == 0 ? 2 : 1;
        for (int64_t i = 0; i < width; i += 4) {
          const uint64_t bits = model::rng_u64(rng, uint64_t(t) << 24 | uint64_t(i));
          for (int64_t j = i; j < std::min(width, i + 4); ++j)
            to[t * width + j] = gain * level[bits >> (4 + 16 * (j - i)) & (kLevels - 1)];
        }
      }
    };
    fill(c, d_c, 0);
    fill(k, d_r, 1);
  };
}

}  // namespace v3b::bench
