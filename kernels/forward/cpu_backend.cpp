#include "kernels/forward/cpu_backend.h"

#include <algorithm>
#include <cstring>
#include <string>

#include "kernels/attention/attention.h"
#include "kernels/core/cpu.h"
#include "kernels/core/pass_team.h"
#include "kernels/forward/paged_sequence.h"
#include "kernels/forward/parts.h"
#include "kernels/gemm/gemm.h"
#include "kernels/norm_rope/rmsnorm.h"
#include "kernels/norm_rope/rope.h"
#include "model/error.h"
#include "model/mtp_support.h"
#include "model/router_config.h"
#include "reference/spec/attention.h"

namespace v3b::kern {
namespace {

using model::ForwardOptions;
using model::ForwardResult;
using model::LogitsOf;

class CpuBackend final : public model::Backend {
 public:
  CpuBackend(model::WeightsPtr w, spec::DType dtype, const model::BackendOptions& o)
      : options_(o),
        cfg_(w->config),
        dtype_(dtype),
        room_(o.max_context > 0 ? o.max_context : cfg_.max_position_embeddings) {
    if (cfg_.qk_rope_head_dim > 512)
      throw Error(ExitCode::usage, "the CPU kernels rotate at most 512 dimensions",
                  "qk_rope_head_dim", "<= 512", std::to_string(cfg_.qk_rope_head_dim));
    if (o.threads > 0) set_num_threads(static_cast<int>(o.threads));
    packed_ = pack_model(w, dtype, o.flags.router_dtype == spec::RouterDtype::bf16, true, true);
    pack_for_cpu(cfg_, packed_);
    const int64_t row = spec::mla_cache_row_bytes(o.flags.kv_format, dtype, cfg_.kv_lora_rank,
                                                  cfg_.qk_rope_head_dim);
    main_pool_ = std::make_shared<PagePool>(cfg_.num_hidden_layers, o.page_size, row, room_);
    mtp_pool_ = std::make_shared<PagePool>(1, o.page_size, row, room_);
    router_ = model::router_config(cfg_, o.flags);
    use_bias_ = model::router_uses_bias(cfg_, o.flags);
    dynamic_ = cfg_.rope_scaling.type == model::RopeType::dynamic || cfg_.rope_scaling.dynamic;
    freqs_ = model::rope_freqs(cfg_, o.flags, dynamic_ ? 1 : room_);
  }

  std::string name() const override { return dtype_ == spec::DType::bf16 ? "cpu_bf16" : "cpu_f32"; }
  const model::ModelConfig& config() const override { return cfg_; }
  std::unique_ptr<model::Sequence> new_sequence() override {
    return std::make_unique<PagedSequence>(main_pool_, mtp_pool_);
  }

  ForwardResult forward(model::Sequence& sequence, std::span<const int32_t> ids,
                        const ForwardOptions& o) override {
    const model::BatchItem item{&sequence, ids};
    return std::move(forward_batch(std::span(&item, 1), o)[0]);
  }

  std::vector<ForwardResult> forward_batch(std::span<const model::BatchItem> items,
                                           const ForwardOptions& o) override {
    if (items.empty()) return {};
    for (const auto& i : items) {
      const auto& seq = dynamic_cast<const PagedSequence&>(*i.sequence);
      check_ids(i.ids, seq.main.length());
    }
    for (size_t i = 0; i < items.size(); ++i)
      for (size_t j = 0; j < i; ++j)
        if (items[i].sequence == items[j].sequence)
          throw Error(ExitCode::usage, "a batch names the same sequence twice", name());
    plan_.items.clear();
    int64_t longest = 0;
    for (const auto& i : items) {
      auto& seq = dynamic_cast<PagedSequence&>(*i.sequence);
      const int64_t T = static_cast<int64_t>(i.ids.size());
      plan_.items.push_back({&seq.main, 0, T, seq.main.length()});
      longest = std::max(longest, seq.main.length() + T);
    }
    if (dynamic_) {
      if (items.size() > 1)
        throw Error(ExitCode::usage, "dynamic RoPE scaling takes one sequence a call", name());
      rotate_for(dynamic_cast<PagedSequence&>(*items[0].sequence), longest);
    }
    extend_rope(longest);
    make_plan(cfg_, options_.absorbed_prefill, plan_);
    const PassTeam team(team_choice_, plan_.rows);
    const int64_t N = plan_.rows, d = cfg_.hidden_size;
    ws_.h.reserve_discard(N * d);
    traced("embedding", {{"T", N}, {"d", d}, {"V", cfg_.vocab_size}}, [&] {
      for (size_t i = 0; i < items.size(); ++i)
        embed(packed_.embed, items[i].ids, ws_.h.data() + plan_.items[i].first * d);
    });

    std::vector<ForwardResult> results(items.size());
    for (size_t i = 0; i < items.size(); ++i) results[i].T = plan_.items[i].T;
    if (o.layer_hidden) keep_hidden(results);
    for (int64_t l = 0; l < cfg_.num_hidden_layers; ++l) {
      run_layer(packed_.layers[static_cast<size_t>(l)], l, main_pool_->arena(l), o, results);
      if (o.layer_hidden) keep_hidden(results);
    }
    finish(packed_.norm, packed_.head_or_embed(), o, results);
    for (size_t i = 0; i < items.size(); ++i)
      plan_.items[i].track->set_length(plan_.items[i].s0 + plan_.items[i].T);
    return results;
  }

  ForwardResult mtp_forward(model::Sequence& sequence, std::span<const int32_t> next_ids,
                            std::span<const float> hidden, const ForwardOptions& o) override {
    if (packed_.mtp.empty())
      throw Error(ExitCode::usage, "this checkpoint has no MTP module", name());
    model::check_single_mtp(cfg_, name());
    auto& seq = dynamic_cast<PagedSequence&>(sequence);
    const PackedMtp& m = packed_.mtp[0];
    const int64_t T = static_cast<int64_t>(next_ids.size()), s0 = seq.mtp.length(),
                  d = cfg_.hidden_size;
    check_ids(next_ids, s0);
    if (static_cast<int64_t>(hidden.size()) != T * d)
      throw Error(ExitCode::usage, "hidden rows do not match the tokens", "mtp_forward",
                  std::to_string(T * d), std::to_string(hidden.size()));
    if (dynamic_) rotate_for(seq, std::max(s0 + T, seq.main.length()));
    extend_rope(s0 + T);
    plan_.items.assign(1, {&seq.mtp, 0, T, s0});
    make_plan(cfg_, options_.absorbed_prefill, plan_);

    ws_.h.reserve_discard(T * d);
    mtp_embed_.reserve_discard(T * d);
    embed(m.own_embed.out > 0 ? m.own_embed : packed_.embed, next_ids, mtp_embed_.data());
    mtp_input(cfg_, options_.flags, dtype_, m, T, s0, mtp_embed_.data(), hidden.data(), mtp_in_,
              ws_.h.data());

    std::vector<ForwardResult> results(1);
    results[0].T = T;
    if (o.layer_hidden) keep_hidden(results);
    run_layer(m.layer, cfg_.num_hidden_layers, mtp_pool_->arena(0), o, results);
    if (o.layer_hidden) keep_hidden(results);
    finish(m.norm, m.own_head.out > 0 ? m.own_head : packed_.head_or_embed(), o, results);
    seq.mtp.set_length(s0 + T);
    return std::move(results[0]);
  }

  void append_rows(model::Sequence& sequence, int64_t n, const model::CacheRows& rows) override {
    auto& seq = dynamic_cast<PagedSequence&>(sequence);
    const int64_t s0 = seq.main.length(), d_c = cfg_.kv_lora_rank, d_r = cfg_.qk_rope_head_dim,
                  e = spec::dtype_bytes(dtype_), row = d_c + d_r;
    if (n < 1 || s0 + n > room_ || dynamic_)
      throw Error(ExitCode::usage, "these rows do not fit", name(),
                  "1 to " + std::to_string(room_ - s0) + ", no dynamic RoPE", std::to_string(n));
    extend_rope(s0 + n);
    plan_.items.assign(1, {&seq.main, 0, n, s0});
    make_plan(cfg_, false, plan_);
    Buffer<float> c(n * d_c), k(n * d_r);
    ws_.lat.reserve_discard(n * row * e);
    const spec::RopeForm form = spec::rope_form(options_.flags.rope_layout, cfg_.rope_interleave);
    for (int64_t l = 0; l < cfg_.num_hidden_layers; ++l) {
      rows(l, c.data(), k.data());
      for (int64_t t = 0; t < n; ++t) {
        uint8_t* to = ws_.lat.data() + t * row * e;
        if (dtype_ == spec::DType::f32)
          std::memcpy(to, c.data() + t * d_c, static_cast<size_t>(d_c * e));
        else
          convert_f32_to_bf16(c.data() + t * d_c, reinterpret_cast<spec::bf16*>(to), d_c);
      }
      rope_cpu_simd({n, 1, d_r, form, false, spec::DType::f32, dtype_, k.data(), d_r, d_r,
                     ws_.lat.data() + d_c * e, row, d_r, rope_.cos.data(), rope_.sin.data(),
                     plan_.positions.data()});
      write_cache(cfg_, options_.flags, dtype_, plan_, main_pool_->arena(l), ws_);
    }
    seq.main.set_length(s0 + n);
  }

 private:
  void check_ids(std::span<const int32_t> ids, int64_t s0) const {
    if (ids.empty())
      throw Error(ExitCode::usage, "a forward pass needs at least one token", name());
    const int64_t length = s0 + static_cast<int64_t>(ids.size());
    if (length > room_)
      throw Error(ExitCode::usage, "context too long", name(),
                  "at most " + std::to_string(room_) + " tokens", std::to_string(length));
    for (size_t i = 0; i < ids.size(); ++i)
      if (ids[i] < 0 || ids[i] >= cfg_.vocab_size)
        throw Error(ExitCode::bad_input, "token id out of range", "position " + std::to_string(i),
                    "0 <= id < " + std::to_string(cfg_.vocab_size), std::to_string(ids[i]));
  }

  // Dynamic scalings: the frequencies of this length; rows that are already rotated must agree with
  // them.
  void rotate_for(PagedSequence& seq, int64_t length) {
    const model::RopeFreqs now = model::rope_freqs(cfg_, options_.flags, length);
    const bool empty = seq.main.length() == 0 && seq.mtp.length() == 0;
    if (!empty && (now.inv_freq != seq.freqs.inv_freq ||
                   now.cos_sin_multiplier != seq.freqs.cos_sin_multiplier))
      throw Error(ExitCode::usage, "dynamic RoPE scaling changes the rotation of cached keys",
                  name(), "the whole sequence in one call (or the reference backend)",
                  "a call that grows the context to " + std::to_string(length));
    seq.freqs = now;
    if (now.inv_freq != freqs_.inv_freq || now.cos_sin_multiplier != freqs_.cos_sin_multiplier)
      rope_ = {};
    freqs_ = now;
  }
  void extend_rope(int64_t positions) {
    if (rope_.positions >= positions) return;
    const int64_t grown =
        std::min(std::max(room_, positions), std::max<int64_t>(2 * rope_.positions, 512));
    rope_ = model::make_rope_table(freqs_, 0, std::max(positions, grown));
  }

  void embed(const Linear& table, std::span<const int32_t> ids, float* h) const {
    const int64_t d = cfg_.hidden_size, T = static_cast<int64_t>(ids.size());
    const int64_t e = spec::dtype_bytes(dtype_);
    for (int64_t t = 0; t < T; ++t) {
      const uint8_t* row = table.bytes() + ids[static_cast<size_t>(t)] * d * e;
      if (dtype_ == spec::DType::f32) {
        std::memcpy(h + t * d, row, static_cast<size_t>(d * e));
      } else {
        convert_bf16_to_f32(reinterpret_cast<const spec::bf16*>(row), h + t * d, d);
      }
    }
  }

  void norm_rows(int64_t T, const float* x, const Buffer<float>& w, void* y, int64_t y_stride,
                 spec::DType y_type) {
    const int64_t d = cfg_.hidden_size;
    traced("rmsnorm", {{"T", T}, {"d", d}}, [&] {
      rmsnorm_mixed({T, d, cfg_.rms_norm_eps, options_.flags.norm_rounding, spec::DType::f32,
                     spec::DType::f32, y_type, x, d, w.data(), y, y_stride});
    });
  }

  void keep_hidden(std::vector<ForwardResult>& results) const {
    const int64_t d = cfg_.hidden_size;
    for (size_t i = 0; i < results.size(); ++i) {
      const float* h = ws_.h.data() + plan_.items[i].first * d;
      results[i].layer_hidden.emplace_back(h, h + plan_.items[i].T * d);
    }
  }

  void run_layer(const PackedLayer& p, int64_t index, uint8_t* arena, const ForwardOptions& o,
                 std::vector<ForwardResult>& results) {
    const LayerContext ctx{cfg_,
                           options_.flags,
                           dtype_,
                           router_,
                           use_bias_,
                           rope_,
                           freqs_.softmax_scale,
                           options_.capacity_factor};
    run_attention(ctx, p, arena, plan_, ws_);
    model::LayerRoutes routes;
    const bool keep = o.routes && p.is_moe;
    run_ffn(ctx, p, plan_.rows, ws_, keep ? &routes : nullptr);
    if (!keep) return;
    const int64_t K = cfg_.num_experts_per_tok;
    for (size_t i = 0; i < results.size(); ++i) {
      const int64_t from = plan_.items[i].first * K, to = from + plan_.items[i].T * K;
      results[i].routes.push_back({index,
                                   K,
                                   {routes.idx.begin() + from, routes.idx.begin() + to},
                                   {routes.weight.begin() + from, routes.weight.begin() + to},
                                   {},
                                   {}});
      if (!routes.dropped.empty())
        results[i].routes.back().dropped.assign(routes.dropped.begin() + from,
                                                routes.dropped.begin() + to);
    }
  }

  // Final norm, hidden rows, logits.
  void finish(const Buffer<float>& norm, const Linear& head, const ForwardOptions& o,
              std::vector<ForwardResult>& results) {
    const int64_t d = cfg_.hidden_size, V = cfg_.vocab_size, e = spec::dtype_bytes(dtype_);
    for (size_t i = 0; i < results.size(); ++i) {
      if (!o.hidden) break;
      const float* h = ws_.h.data() + plan_.items[i].first * d;
      results[i].hidden.resize(static_cast<size_t>(plan_.items[i].T * d));
      if (options_.flags.mtp_hidden == spec::MtpHidden::pre_norm) {
        std::copy_n(h, plan_.items[i].T * d, results[i].hidden.data());
      } else {
        norm_rows(plan_.items[i].T, h, norm, results[i].hidden.data(), d, spec::DType::f32);
      }
    }
    if (o.logits == LogitsOf::none) return;
    const int64_t B = static_cast<int64_t>(results.size());
    if (o.logits == LogitsOf::last && B > 1) {  // one row of each sequence, one product
      ws_.x.reserve_discard(B * d * e);
      ws_.logits.reserve_discard(B * V);
      for (int64_t i = 0; i < B; ++i) {
        const PassItem& item = plan_.items[static_cast<size_t>(i)];
        norm_rows(1, ws_.h.data() + (item.first + item.T - 1) * d, norm, ws_.x.data() + i * d * e,
                  d, dtype_);
      }
      linear(dtype_, head, B, ws_.x.data(), d, ws_.logits.data(), V, spec::DType::f32);
      for (int64_t i = 0; i < B; ++i)
        results[static_cast<size_t>(i)].logits.assign(ws_.logits.data() + i * V,
                                                      ws_.logits.data() + (i + 1) * V);
      return;
    }
    for (size_t i = 0; i < results.size(); ++i) {
      const PassItem& item = plan_.items[i];
      const int64_t first = o.logits == LogitsOf::last ? item.first + item.T - 1 : item.first;
      const int64_t n = o.logits == LogitsOf::last ? 1 : item.T;
      results[i].logits.resize(static_cast<size_t>(n * V));
      for (int64_t r0 = 0; r0 < n; r0 += kRowChunk) {
        const int64_t m = std::min(kRowChunk, n - r0);
        ws_.x.reserve_discard(m * d * e);
        norm_rows(m, ws_.h.data() + (first + r0) * d, norm, ws_.x.data(), d, dtype_);
        linear(dtype_, head, m, ws_.x.data(), d, results[i].logits.data() + r0 * V, V,
               spec::DType::f32);
      }
    }
  }

  model::BackendOptions options_;
  model::ModelConfig cfg_;
  spec::DType dtype_;
  int64_t room_;
  PackedModel packed_;
  std::shared_ptr<PagePool> main_pool_, mtp_pool_;
  spec::RouterConfig router_;
  bool use_bias_ = false, dynamic_ = false;
  model::RopeFreqs freqs_;
  model::RopeTable rope_;
  Plan plan_;
  TeamChoice team_choice_;
  Workspace ws_;
  Buffer<float> mtp_embed_;
  Buffer<uint8_t> mtp_in_;
};

}  // namespace

std::unique_ptr<model::Backend> make_cpu_backend(model::WeightsPtr weights, spec::DType compute,
                                                 const model::BackendOptions& options) {
  if (compute != spec::DType::bf16 && compute != spec::DType::f32)
    throw Error(ExitCode::usage, "the CPU backend computes in bf16 or f32", "--dtype",
                "bf16 or f32", spec::dtype_name(compute));
  return std::make_unique<CpuBackend>(std::move(weights), compute, options);
}

}  // namespace v3b::kern
