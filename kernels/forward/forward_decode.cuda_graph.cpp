// A decode step as one captured graph (SPEC 1.32): the pass of the CUDA backend without the host. See cuda_replay.h.
#include <algorithm>

#include "kernels/forward/cuda_replay.h"
#include "model/error.h"

namespace v3b::kern {

CudaReplay::CudaReplay(model::Backend& backend, std::span<const model::BatchItem> items)
    : m_(cuda_model_of(backend)) {
  if (m_.dynamic_rope || items.empty())
    throw Error(ExitCode::usage, "no pass to replay", backend.name(),
                "items, and no dynamic RoPE scaling");
  std::vector<int32_t> ids;
  int64_t longest = 0;
  for (const auto& item : items) {
    auto& track = dynamic_cast<PagedSequence&>(*item.sequence).main;
    const int64_t T = static_cast<int64_t>(item.ids.size());
    plan_.items.push_back({&track, 0, T, track.length()});
    longest = std::max(longest, track.length() + T);
    ids.insert(ids.end(), item.ids.begin(), item.ids.end());
  }
  dp_ = m_.upload_plan(plan_, longest, *m_.main_arena, ids, plan_buffer_);
  for (int64_t l = 0; l < m_.cfg.num_hidden_layers; ++l)
    if (m_.weights.layers[static_cast<size_t>(l)].is_moe) moe_layers_.push_back(l);
  reserve_outputs();
}

CudaReplay::CudaReplay(model::Backend& backend, model::Sequence& sequence,
                       std::span<const int32_t> next_ids, std::span<const float> hidden)
    : m_(cuda_model_of(backend)), mtp_(true) {
  auto& track = dynamic_cast<PagedSequence&>(sequence).mtp;
  const int64_t T = static_cast<int64_t>(next_ids.size()), s0 = track.length();
  if (m_.dynamic_rope || m_.weights.mtp.empty() || T == 0 ||
      static_cast<int64_t>(hidden.size()) != T * m_.cfg.hidden_size)
    throw Error(ExitCode::usage, "no MTP pass to replay", backend.name(),
                "tokens with a hidden row each, and an MTP module");
  zero_first_ = m_.options.flags.mtp_zero_pos0 && s0 == 0;
  plan_.items.assign(1, {&track, 0, T, s0});
  dp_ = m_.upload_plan(plan_, s0 + T, *m_.mtp_arena, {next_ids.begin(), next_ids.end()},
                       plan_buffer_);
  const int64_t bytes = static_cast<int64_t>(hidden.size()) * 4;
  cuda_upload(mtp_hidden_.reserve(bytes), hidden.data(), bytes, m_.stream);
  moe_layers_.push_back(m_.cfg.num_hidden_layers);
  reserve_outputs();
}

void CudaReplay::reserve_outputs() {
  const int64_t routes = static_cast<int64_t>(moe_layers_.size()) * dp_.rows *
                         std::max<int64_t>(m_.cfg.num_experts_per_tok, 1) * 4;
  logits_ = DeviceBuffer(static_cast<int64_t>(plan_.items.size()) * m_.cfg.vocab_size * 4);
  hidden_ = DeviceBuffer(dp_.rows * m_.cfg.hidden_size * 4);
  idx_ = DeviceBuffer(routes), weight_ = DeviceBuffer(routes);
  poison(m_.stream);
}

void CudaReplay::poison(CudaStream stream) {
  for (DeviceBuffer* b : {&logits_, &hidden_, &idx_, &weight_})
    if (b->bytes() > 0) cuda_fill(b->data(), 0xFF, b->bytes(), stream);
}

void CudaReplay::layer(int64_t index, int64_t tapped) {
  const int64_t K = m_.cfg.num_experts_per_tok;
  m_.run_layer(index, plan_, dp_,
               [&](int64_t r0, int64_t n, const int32_t* idx, const float* weight, const int32_t*) {
                 const int64_t at = (tapped * dp_.rows + r0) * K;
                 cuda_copy(idx_.as<int32_t>() + at, idx, n * K * 4, m_.stream);
                 cuda_copy(weight_.as<float>() + at, weight, n * K * 4, m_.stream);
               });
}

void CudaReplay::enqueue(CudaStream stream) {
  const int64_t d = m_.cfg.hidden_size;
  if (mtp_) {
    m_.mtp_input(dp_.rows, dp_.ids, mtp_hidden_.as<float>(), zero_first_);
    layer(m_.cfg.num_hidden_layers, 0);
  } else {
    m_.ws.h.reserve(dp_.rows * d * 4);
    m_.embed(m_.weights.embed, dp_.rows, dp_.ids, m_.ws.h.as<float>());
    int64_t tapped = 0;
    for (int64_t l = 0; l < m_.cfg.num_hidden_layers; ++l) {
      layer(l, tapped);
      tapped += m_.weights.layers[static_cast<size_t>(l)].is_moe ? 1 : 0;
    }
  }
  const float* norm = mtp_ ? m_.weights.mtp[0].norm : m_.weights.norm;
  m_.hidden_rows(norm, 0, dp_.rows, hidden_.as<float>());
  const float* z =
      m_.last_logits(norm, mtp_ ? m_.mtp_head() : m_.weights.head_or_embed(), plan_.items);
  cuda_copy(logits_.data(), z, logits_.bytes(), stream);
}

void CudaReplay::capture(CudaStream stream) {
  enqueue(stream);
  cuda_synchronize(stream);
  graph_.begin(stream);
  enqueue(stream);
  graph_.end(stream);
}

std::vector<model::ForwardResult> CudaReplay::fetch(CudaStream stream) {
  const int64_t d = m_.cfg.hidden_size, V = m_.cfg.vocab_size, K = m_.cfg.num_experts_per_tok;
  std::vector<model::ForwardResult> results(plan_.items.size());
  const auto get = [&](auto& to, const auto* from, int64_t n) {
    to.resize(static_cast<size_t>(n));
    cuda_download(to.data(), from, n * 4, stream);
  };
  for (size_t i = 0; i < results.size(); ++i) {
    const PassItem& item = plan_.items[i];
    model::ForwardResult& r = results[i];
    r.T = item.T;
    get(r.logits, logits_.as<float>() + static_cast<int64_t>(i) * V, V);
    get(r.hidden, hidden_.as<float>() + item.first * d, item.T * d);
    for (size_t l = 0; l < moe_layers_.size(); ++l) {
      const int64_t at = (static_cast<int64_t>(l) * dp_.rows + item.first) * K;
      model::LayerRoutes routes;
      routes.layer = moe_layers_[l], routes.K = K;
      get(routes.idx, idx_.as<int32_t>() + at, item.T * K);
      get(routes.weight, weight_.as<float>() + at, item.T * K);
      r.routes.push_back(std::move(routes));
    }
  }
  return results;
}

}  // namespace v3b::kern
