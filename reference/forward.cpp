#include "reference/forward.h"

#include <Eigen/Core>
#include <algorithm>
#include <array>
#include <string>
#include <type_traits>

#include "model/error.h"
#include "model/mtp_support.h"
#include "model/rope_table.h"
#include "model/router_config.h"
#include "reference/embedding.h"
#include "reference/forward_params.h"
#include "reference/kv_cache.h"
#include "reference/mla.h"
#include "reference/moe.h"
#include "reference/rmsnorm.h"
#include "reference/rope.h"
#include "reference/router.h"
#include "reference/spec/attention.h"

namespace v3b::ref {
namespace {

using model::ForwardOptions;
using model::ForwardResult;

constexpr double kLatentNormEps = 1e-6;  // q_a and kv_a norms ignore rms_norm_eps (SPEC 1.2)
constexpr double kEagerBytes = 1 << 30;  // routed experts of more widened bytes are widened late,
constexpr int64_t kLateExperts = 8;      // so many at a time

template <class S>
using Matrix = Eigen::Matrix<S, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;
template <class S>
using View = Eigen::Map<const Matrix<S>>;

template <class S>
Matrix<S> linear(const Matrix<S>& x, const std::vector<S>& w, int64_t out) {
  return x * View<S>(w.data(), out, x.cols()).transpose();
}
template <class S>
std::vector<float> floats(const Matrix<S>& x) {
  return std::vector<float>(x.data(), x.data() + x.size());
}

// Rows that one layer remembers: the normalised latent and the rope key before rotation.
template <class S>
struct LayerCache {
  std::vector<S> c, k_raw;
};

template <class S>
class RefSequence final : public model::Sequence {
 public:
  RefSequence(int64_t layers, int64_t mtp, int64_t d_c, int64_t d_r)
      : main(layers), mtp(mtp), d_c_(d_c), d_r_(d_r) {}
  int64_t length() const override { return rows(main); }
  int64_t mtp_length() const override { return rows(mtp); }
  void truncate(int64_t n) override { cut(main, n); }
  void mtp_truncate(int64_t n) override { cut(mtp, n); }
  int64_t cache_bytes() const override {
    size_t n = 0;
    for (const auto* v : {&main, &mtp})
      for (const auto& l : *v) n += l.c.capacity() + l.k_raw.capacity();
    return static_cast<int64_t>(n * sizeof(S));
  }
  std::vector<LayerCache<S>> main, mtp;

 private:
  int64_t rows(const std::vector<LayerCache<S>>& v) const {
    return v.empty() ? 0 : static_cast<int64_t>(v[0].c.size()) / d_c_;
  }
  void cut(std::vector<LayerCache<S>>& v, int64_t n) {
    if (n < 0 || n > rows(v))
      throw Error(ExitCode::usage, "cannot truncate a cache", "sequence",
                  "0.." + std::to_string(rows(v)), std::to_string(n));
    for (auto& l : v) {
      l.c.resize(static_cast<size_t>(n * d_c_));
      l.k_raw.resize(static_cast<size_t>(n * d_r_));
    }
  }
  int64_t d_c_, d_r_;
};

// One sequence's rows [first, first + T) of a pass, at positions s0 and on.
template <class S>
struct Part {
  std::vector<LayerCache<S>>& caches;
  int64_t first, T, s0;
  ForwardResult& r;
};

template <class S>
class RefBackend final : public model::Backend {
 public:
  RefBackend(model::WeightsPtr w, const model::BackendOptions& o)
      : options_(o),
        late_(expert_bytes(w->config) > kEagerBytes ? w : nullptr),
        params_(make_params<S>(*w, late_ == nullptr)),
        cfg_(params_.config) {}

  std::string name() const override {
    return std::is_same_v<S, double> ? "reference_f64" : "reference_f32";
  }
  const model::ModelConfig& config() const override { return cfg_; }
  std::unique_ptr<model::Sequence> new_sequence() override {
    return std::make_unique<RefSequence<S>>(cfg_.num_hidden_layers, params_.mtp.empty() ? 0 : 1,
                                            cfg_.kv_lora_rank, cfg_.qk_rope_head_dim);
  }

  ForwardResult forward(model::Sequence& sequence, std::span<const int32_t> ids,
                        const ForwardOptions& o) override {
    return std::move(forward_batch(std::array{model::BatchItem{&sequence, ids}}, o)[0]);
  }

  // Weights meet the rows of all sequences together; attention, routes and capacity are each sequence's own.
  std::vector<ForwardResult> forward_batch(std::span<const model::BatchItem> items,
                                           const ForwardOptions& o) override {
    const int64_t d = cfg_.hidden_size;
    std::vector<ForwardResult> results(items.size());
    std::vector<Part<S>> parts;
    int64_t rows = 0;
    for (size_t i = 0; i < items.size(); ++i) {
      auto& seq = dynamic_cast<RefSequence<S>&>(*items[i].sequence);
      const int64_t T = results[i].T = static_cast<int64_t>(items[i].ids.size());
      check_room(seq.length() + T, T);
      parts.push_back({seq.main, rows, T, seq.length(), results[i]});
      rows += T;
    }
    Matrix<S> h(rows, d);
    for (size_t i = 0; i < items.size(); ++i)
      embedding<S>(parts[i].T, d, cfg_.vocab_size, items[i].ids.data(), params_.embed.data(),
                   h.data() + parts[i].first * d);
    keep_layer(parts, h, o);
    for (int64_t l = 0; l < cfg_.num_hidden_layers; ++l) {
      layer(params_.layers[l], l, l, parts, h, o);
      keep_layer(parts, h, o);
    }
    outputs(parts, h, params_.norm, params_.head_or_embed(), o);
    return results;
  }

  ForwardResult mtp_forward(model::Sequence& sequence, std::span<const int32_t> next_ids,
                            std::span<const float> hidden, const ForwardOptions& o) override {
    if (params_.mtp.empty())
      throw Error(ExitCode::usage, "this checkpoint has no MTP module", name());
    model::check_single_mtp(cfg_, name());
    auto& seq = dynamic_cast<RefSequence<S>&>(sequence);
    const MtpParams<S>& m = params_.mtp[0];
    const int64_t T = static_cast<int64_t>(next_ids.size()), s0 = seq.mtp_length(),
                  d = cfg_.hidden_size;
    check_room(s0 + T, T);
    if (static_cast<int64_t>(hidden.size()) != T * d)
      throw Error(ExitCode::usage, "hidden rows do not match the tokens", "mtp_forward",
                  std::to_string(T * d), std::to_string(hidden.size()));
    Matrix<S> e(T, d), h(T, d);
    embedding<S>(T, d, cfg_.vocab_size, next_ids.data(),
                 (m.own_embed.empty() ? params_.embed : m.own_embed).data(), e.data());
    if (options_.flags.mtp_zero_pos0 && s0 == 0) e.row(0).setZero();
    std::copy(hidden.begin(), hidden.end(), h.data());
    const bool e_first = options_.flags.mtp_concat == spec::MtpConcat::emb_h;
    Matrix<S> u(T, 2 * d);
    u.leftCols(d) =
        e_first ? norm(e, m.enorm, cfg_.rms_norm_eps) : norm(h, m.hnorm, cfg_.rms_norm_eps);
    u.rightCols(d) =
        e_first ? norm(h, m.hnorm, cfg_.rms_norm_eps) : norm(e, m.enorm, cfg_.rms_norm_eps);
    Matrix<S> x = linear(u, m.eh_proj, d);
    ForwardResult r;
    r.T = T;
    const std::vector<Part<S>> parts = {{seq.mtp, 0, T, s0, r}};
    keep_layer(parts, x, o);
    layer(m.layer, cfg_.num_hidden_layers, 0, parts, x, o);
    keep_layer(parts, x, o);
    outputs(parts, x, m.norm, m.own_head.empty() ? params_.head_or_embed() : m.own_head, o);
    return r;
  }

  void append_rows(model::Sequence& sequence, int64_t n, const model::CacheRows& rows) override {
    auto& seq = dynamic_cast<RefSequence<S>&>(sequence);
    check_room(seq.length() + n, n);
    std::vector<float> c(static_cast<size_t>(n * cfg_.kv_lora_rank)),
        k(static_cast<size_t>(n * cfg_.qk_rope_head_dim));
    for (size_t l = 0; l < seq.main.size(); ++l) {
      rows(static_cast<int64_t>(l), c.data(), k.data());
      seq.main[l].c.insert(seq.main[l].c.end(), c.begin(), c.end());
      seq.main[l].k_raw.insert(seq.main[l].k_raw.end(), k.begin(), k.end());
    }
  }

 private:
  int64_t room() const {
    return options_.max_context > 0 ? options_.max_context : cfg_.max_position_embeddings;
  }
  static double expert_bytes(const model::ModelConfig& c) {
    return static_cast<double>(sizeof(S)) *
           static_cast<double>(c.num_hidden_layers * c.n_routed_experts) *
           static_cast<double>(3 * c.hidden_size * c.moe_intermediate_size);
  }
  void check_room(int64_t length, int64_t T) const {
    if (T < 1) throw Error(ExitCode::usage, "a forward pass needs at least one token", name());
    if (length > room())
      throw Error(ExitCode::usage, "context too long", name(),
                  "at most " + std::to_string(room()) + " tokens", std::to_string(length));
  }

  Matrix<S> norm(const Matrix<S>& x, const std::vector<S>& w, double eps) const {
    Matrix<S> y(x.rows(), x.cols());
    rmsnorm<S>(x.rows(), x.cols(), static_cast<S>(eps), x.data(), w.data(), y.data(),
               options_.flags.norm_rounding, spec::DType::bf16);
    return y;
  }

  static void keep_layer(const std::vector<Part<S>>& parts, const Matrix<S>& h,
                         const ForwardOptions& o) {
    if (!o.layer_hidden) return;
    for (const Part<S>& a : parts)
      a.r.layer_hidden.push_back(floats<S>(h.middleRows(a.first, a.T)));
  }

  void outputs(const std::vector<Part<S>>& parts, const Matrix<S>& h, const std::vector<S>& w,
               const std::vector<S>& head, const ForwardOptions& o) const {
    const Matrix<S> f = norm(h, w, cfg_.rms_norm_eps);
    const bool post = options_.flags.mtp_hidden == spec::MtpHidden::post_norm,
               all = o.logits == model::LogitsOf::all;
    for (const Part<S>& a : parts)
      if (o.hidden) a.r.hidden = floats<S>((post ? f : h).middleRows(a.first, a.T));
    if (o.logits == model::LogitsOf::none) return;
    Matrix<S> rows = f;
    if (!all) {
      rows.resize(static_cast<int64_t>(parts.size()), f.cols());
      for (size_t i = 0; i < parts.size(); ++i)
        rows.row(static_cast<int64_t>(i)) = f.row(parts[i].first + parts[i].T - 1);
    }
    const Matrix<S> z = linear(rows, head, cfg_.vocab_size);
    for (size_t i = 0; i < parts.size(); ++i)
      parts[i].r.logits = floats<S>(all ? z.middleRows(parts[i].first, parts[i].T)
                                        : z.middleRows(static_cast<int64_t>(i), 1));
  }

  // Routed experts of one layer; those of a late model are widened a few at a time, and their shares added up.
  void routed(const LayerParams<S>& p, int64_t index, const Matrix<S>& u,
              const std::vector<int32_t>& served, const S* weight, const Ffn<S>& shared,
              Matrix<S>& y) const {
    const int64_t T = u.rows(), E = cfg_.n_routed_experts, K = cfg_.num_experts_per_tok,
                  m = cfg_.moe_intermediate_size, shared_m = cfg_.n_shared_experts * m;
    std::vector<Ffn<S>> experts(static_cast<size_t>(E));
    const auto point = [](const FfnParams<S>& e) {
      return Ffn<S>{e.gate.data(), e.up.data(), e.down.data()};
    };
    const auto run = [&](const std::vector<int32_t>& idx, const Ffn<S>& also, Matrix<S>& out) {
      moe<S>(T, u.cols(), m, E, K, u.data(), idx.data(), weight, experts, also, shared_m,
             out.data(), options_.flags.moe_accum);
    };
    if (late_ == nullptr) {
      for (size_t e = 0; e < experts.size(); ++e) experts[e] = point(p.experts[e]);
      return run(served, shared, y);
    }
    const auto& stored = index < cfg_.num_hidden_layers
                             ? late_->layers[static_cast<size_t>(index)].moe.experts
                             : late_->mtp[0].layer.moe.experts;
    // Sums in bf16 depend on their order, so they need all experts at once.
    const int64_t together = options_.flags.moe_accum == spec::MoeAccum::fp32 ? kLateExperts : E;
    y.setZero();
    for (int64_t first = 0; first < E; first += together) {
      std::vector<int32_t> idx(served);
      std::vector<FfnParams<S>> wide(static_cast<size_t>(E));
      for (int32_t& e : idx) {
        if (e < first || e >= first + together) e = -1;
        if (e < 0 || !wide[static_cast<size_t>(e)].gate.empty()) continue;
        wide[static_cast<size_t>(e)] = copy_ffn<S>(stored[static_cast<size_t>(e)]);
        experts[static_cast<size_t>(e)] = point(wide[static_cast<size_t>(e)]);
      }
      Matrix<S> part(y.rows(), y.cols());
      run(idx, first == 0 ? shared : Ffn<S>{}, part);
      y += part;
    }
  }

  // `slot`: which of a part's caches is this layer's.
  void layer(const LayerParams<S>& p, int64_t index, int64_t slot,
             const std::vector<Part<S>>& parts, Matrix<S>& h, const ForwardOptions& o) const {
    h += attention(p, slot, parts, norm(h, p.input_norm, cfg_.rms_norm_eps));
    const Matrix<S> u = norm(h, p.post_norm, cfg_.rms_norm_eps);
    Matrix<S> y(u.rows(), u.cols());
    if (p.is_moe) {
      moe_block(p, index, parts, u, y, o);
    } else {
      const Ffn<S> w{p.mlp.gate.data(), p.mlp.up.data(), p.mlp.down.data()};
      ffn<S>(u.rows(), u.cols(), cfg_.intermediate_size, u.data(), w, y.data());
    }
    h += y;
  }

  Matrix<S> attention(const LayerParams<S>& p, int64_t slot, const std::vector<Part<S>>& parts,
                      const Matrix<S>& x) const {
    const int64_t n_h = cfg_.num_attention_heads, d_c = cfg_.kv_lora_rank,
                  d_r = cfg_.qk_rope_head_dim, q_cols = n_h * (cfg_.qk_nope_head_dim + d_r);
    // SPEC 1.6, projections.
    const Matrix<S> q =
        cfg_.q_lora_rank > 0
            ? linear(norm(linear(x, p.q_a, cfg_.q_lora_rank), p.q_a_norm, kLatentNormEps), p.q_b,
                     q_cols)
            : linear(x, p.q_proj, q_cols);
    const Matrix<S> kv = linear(x, p.kv_a, d_c + d_r);
    Matrix<S> o(x.rows(), n_h * cfg_.v_head_dim);
    for (const Part<S>& a : parts)
      o.middleRows(a.first, a.T) = attention_core_of(
          p, a.caches[static_cast<size_t>(slot)], a.s0, q.middleRows(a.first, a.T),
          norm(kv.block(a.first, 0, a.T, d_c), p.kv_a_norm, kLatentNormEps),
          kv.block(a.first, d_c, a.T, d_r));
    return linear(o, p.o, cfg_.hidden_size);
  }

  // One sequence: RoPE, its new rows into the cache, and what q then sees. -> [T, n_h d_v]
  Matrix<S> attention_core_of(const LayerParams<S>& p, LayerCache<S>& cache, int64_t s0,
                              Matrix<S> q, const Matrix<S>& c_new, const Matrix<S>& k_new) const {
    const MlaShape m{cfg_.num_attention_heads, cfg_.qk_nope_head_dim, cfg_.qk_rope_head_dim,
                     cfg_.v_head_dim, cfg_.kv_lora_rank};
    const int64_t T = q.rows(), s = s0 + T, half = m.d_r / 2;
    const spec::RopeForm form = spec::rope_form(options_.flags.rope_layout, cfg_.rope_interleave);
    const bool dynamic =
        cfg_.rope_scaling.type == model::RopeType::dynamic || cfg_.rope_scaling.dynamic;
    const model::RopeFreqs freqs = model::rope_freqs(cfg_, options_.flags, dynamic ? s : room());
    std::vector<S> cos(static_cast<size_t>(s * half)), sin(cos.size());
    rope_table<S>(freqs, 0, s, cos.data(), sin.data());

    Matrix<S> q_pe(T, m.n_h * m.d_r);
    for (int64_t i = 0; i < m.n_h; ++i)
      q_pe.middleCols(i * m.d_r, m.d_r) = q.middleCols(i * m.d_qk() + m.d_n, m.d_r);
    rope<S>(T, m.n_h, m.d_r, form, false, q_pe.data(), cos.data() + s0 * half,
            sin.data() + s0 * half, q_pe.data());
    for (int64_t i = 0; i < m.n_h; ++i)
      q.middleCols(i * m.d_qk() + m.d_n, m.d_r) = q_pe.middleCols(i * m.d_r, m.d_r);
    cache.c.insert(cache.c.end(), c_new.data(), c_new.data() + c_new.size());
    cache.k_raw.insert(cache.k_raw.end(), k_new.data(), k_new.data() + k_new.size());

    // What the cache gives back: rotated keys, through the FP8 record if asked for.
    Matrix<S> c = View<S>(cache.c.data(), s, m.d_c), k_pe(s, m.d_r);
    rope<S>(s, 1, m.d_r, form, false, cache.k_raw.data(), cos.data(), sin.data(), k_pe.data());
    if (options_.flags.kv_format != spec::KvFormat::bf16) through_record(c, k_pe);

    Matrix<S> o(T, m.n_h * m.d_v);
    if (s0 == 0 && !options_.absorbed_prefill) {
      std::vector<S> k(static_cast<size_t>(s * m.n_h * m.d_qk())),
          v(static_cast<size_t>(s * m.n_h * m.d_v));
      mla_expand<S>(m, s, c.data(), k_pe.data(), p.kv_b.data(), k.data(), v.data());
      AttentionShape a;
      a.T = T, a.s0 = s0, a.n_h = a.n_kv = m.n_h, a.d_qk = m.d_qk(), a.d_v = m.d_v,
      a.scale = freqs.softmax_scale;
      attention_core<S>(a, q.data(), k.data(), v.data(), o.data());
    } else {
      Matrix<S> rows(s, m.d_c + m.d_r), q_abs(T, m.n_h * (m.d_c + m.d_r)), o_lat(T, m.n_h * m.d_c);
      rows << c, k_pe;
      mla_absorb_q<S>(m, T, q.data(), p.kv_b.data(), q_abs.data());
      mla_latent_core<S>(T, s0, m.n_h, m.d_c, m.d_r, freqs.softmax_scale, q_abs.data(), rows.data(),
                         o_lat.data());
      mla_unabsorb<S>(m, T, o_lat.data(), p.kv_b.data(), o.data());
    }
    return o;
  }

  void through_record(Matrix<S>& c, Matrix<S>& k_pe) const {
    const int64_t d_c = c.cols(), d_r = k_pe.cols();
    std::vector<uint8_t> record(static_cast<size_t>(
        spec::mla_cache_row_bytes(options_.flags.kv_format, spec::DType::bf16, d_c, d_r)));
    std::vector<S> row(static_cast<size_t>(d_c + d_r));
    for (int64_t j = 0; j < c.rows(); ++j) {
      kv_record_write<S>(d_c, d_r, options_.flags.kv_format, c.row(j).data(), k_pe.row(j).data(),
                         record.data());
      kv_record_read<S>(d_c, d_r, record.data(), row.data());
      std::copy_n(row.data(), d_c, c.row(j).data());
      std::copy_n(row.data() + d_c, d_r, k_pe.row(j).data());
    }
  }

  void moe_block(const LayerParams<S>& p, int64_t index, const std::vector<Part<S>>& parts,
                 const Matrix<S>& u, Matrix<S>& y, const ForwardOptions& o) const {
    const int64_t E = cfg_.n_routed_experts, K = cfg_.num_experts_per_tok;
    const bool bf16 = options_.flags.router_dtype == spec::RouterDtype::bf16;
    const auto rounded = [&](const Matrix<S>& a) {
      return Matrix<S>(a.unaryExpr([](S v) { return round_to<S>(v, spec::DType::bf16); }));
    };
    Matrix<S> z = linear(bf16 ? rounded(u) : u, p.router, E);
    if (bf16) z = rounded(z);
    const bool biased = model::router_uses_bias(cfg_, options_.flags) && !p.bias.empty();
    const Routes<S> routes = route<S>(model::router_config(cfg_, options_.flags), u.rows(),
                                      z.data(), biased ? p.bias.data() : nullptr);
    Ffn<S> shared;
    if (!p.shared.gate.empty())
      shared = {p.shared.gate.data(), p.shared.up.data(), p.shared.down.data()};
    std::vector<int32_t> served = routes.idx;  // -1: beyond the expert's capacity
    for (const Part<S>& a : parts) {
      const auto choices = [&](const auto& of) {
        return std::span(of).subspan(static_cast<size_t>(a.first * K),
                                     static_cast<size_t>(a.T * K));
      };
      const auto idx = choices(routes.idx);
      const auto weight = choices(routes.weight);
      const auto gap = std::span(routes.gap).subspan(size_t(a.first), size_t(a.T));
      std::vector<char> dropped;
      if (options_.capacity_factor > 0) {
        const std::vector<double> gate(weight.begin(), weight.end());
        const auto keep = apply_capacity(a.T, K, E, idx.data(), gate.data(),
                                         expert_capacity(options_.capacity_factor, K, a.T, E),
                                         options_.flags.drop_policy);
        dropped.assign(keep.size(), 0);
        for (size_t i = 0; i < keep.size(); ++i)
          if (!keep[i]) served[size_t(a.first * K) + i] = -1, dropped[i] = 1;
      }
      if (o.routes)
        a.r.routes.push_back({index,
                              K,
                              {idx.begin(), idx.end()},
                              {weight.begin(), weight.end()},
                              {gap.begin(), gap.end()},
                              std::move(dropped)});
    }
    routed(p, index, u, served, routes.weight.data(), shared, y);
  }

  model::BackendOptions options_;
  model::WeightsPtr late_;  // not null: where routed experts are widened from, when they are used
  ModelParams<S> params_;
  const model::ModelConfig& cfg_;
};

}  // namespace

template <class S>
std::unique_ptr<model::Backend> make_reference_backend(model::WeightsPtr weights,
                                                       const model::BackendOptions& options) {
  return std::make_unique<RefBackend<S>>(std::move(weights), options);
}
template std::unique_ptr<model::Backend> make_reference_backend<float>(
    model::WeightsPtr, const model::BackendOptions&);
template std::unique_ptr<model::Backend> make_reference_backend<double>(
    model::WeightsPtr, const model::BackendOptions&);

}  // namespace v3b::ref
