#include "kernels/forward/cuda_backend.h"

#include <algorithm>
#include <string>

#include "kernels/forward/cuda_model.h"
#include "kernels/forward/forward_glue_cuda.h"
#include "model/error.h"
#include "model/mtp_support.h"

namespace v3b::kern {
namespace {

using model::ForwardOptions;
using model::ForwardResult;
using model::LogitsOf;

constexpr int64_t kLogitRows =
    1024;  // rows of logits in device memory at once: 1024 x 129280 x 4 = 530 MB

class CudaBackend final : public model::Backend {
 public:
  CudaBackend(model::WeightsPtr w, spec::DType dtype, const model::BackendOptions& o)
      : m(std::move(w), dtype, o) {}

  std::string name() const override {
    return m.dtype == spec::DType::bf16 ? "cuda_bf16" : "cuda_f32";
  }
  const model::ModelConfig& config() const override { return m.cfg; }
  std::unique_ptr<model::Sequence> new_sequence() override {
    return std::make_unique<PagedSequence>(m.main_pool, m.mtp_pool);
  }

  ForwardResult forward(model::Sequence& sequence, std::span<const int32_t> ids,
                        const ForwardOptions& o) override {
    const model::BatchItem item{&sequence, ids};
    return std::move(forward_batch(std::span(&item, 1), o)[0]);
  }

  std::vector<ForwardResult> forward_batch(std::span<const model::BatchItem> items,
                                           const ForwardOptions& o) override {
    if (items.empty()) return {};
    std::vector<int32_t> ids;
    plan_.items.clear();
    int64_t longest = 0;
    for (size_t i = 0; i < items.size(); ++i) {
      auto& seq = dynamic_cast<PagedSequence&>(*items[i].sequence);
      check_ids(items[i].ids, seq.main.length());
      for (size_t j = 0; j < i; ++j)
        if (items[i].sequence == items[j].sequence)
          throw Error(ExitCode::usage, "a batch names the same sequence twice", name());
      const int64_t T = static_cast<int64_t>(items[i].ids.size());
      plan_.items.push_back({&seq.main, 0, T, seq.main.length()});
      longest = std::max(longest, seq.main.length() + T);
      ids.insert(ids.end(), items[i].ids.begin(), items[i].ids.end());
    }
    if (m.dynamic_rope) {
      if (items.size() > 1)
        throw Error(ExitCode::usage, "dynamic RoPE scaling takes one sequence a call", name());
      m.rotate_for(dynamic_cast<PagedSequence&>(*items[0].sequence), longest);
    }
    const DevicePlan dp = m.upload_plan(plan_, longest, *m.main_arena, ids, plan_buffer_);
    m.ws.h.reserve(dp.rows * m.cfg.hidden_size * 4);
    m.embed(m.weights.embed, dp.rows, dp.ids, m.ws.h.as<float>());
    std::vector<ForwardResult> results(items.size());
    for (size_t i = 0; i < items.size(); ++i) results[i].T = plan_.items[i].T;
    if (o.layer_hidden) keep_hidden(results);
    for (int64_t l = 0; l < m.cfg.num_hidden_layers; ++l) run_layer(l, dp, o, results);
    finish(m.weights.norm, m.weights.head_or_embed(), o, results);
    for (PassItem& item : plan_.items) item.track->set_length(item.s0 + item.T);
    return results;
  }

  ForwardResult mtp_forward(model::Sequence& sequence, std::span<const int32_t> next_ids,
                            std::span<const float> hidden, const ForwardOptions& o) override {
    if (m.weights.mtp.empty())
      throw Error(ExitCode::usage, "this checkpoint has no MTP module", name());
    model::check_single_mtp(m.cfg, name());
    auto& seq = dynamic_cast<PagedSequence&>(sequence);
    const int64_t T = static_cast<int64_t>(next_ids.size()), s0 = seq.mtp.length(),
                  d = m.cfg.hidden_size;
    check_ids(next_ids, s0);
    if (static_cast<int64_t>(hidden.size()) != T * d)
      throw Error(ExitCode::usage, "hidden rows do not match the tokens", "mtp_forward",
                  std::to_string(T * d), std::to_string(hidden.size()));
    plan_.items.assign(1, {&seq.mtp, 0, T, s0});
    if (m.dynamic_rope) m.rotate_for(seq, std::max(s0 + T, seq.main.length()));
    const DevicePlan dp = m.upload_plan(plan_, s0 + T, *m.mtp_arena,
                                        {next_ids.begin(), next_ids.end()}, plan_buffer_);
    cuda_upload(mtp_hidden_.reserve(T * d * 4), hidden.data(), T * d * 4, m.stream);
    m.mtp_input(T, dp.ids, mtp_hidden_.as<float>(), m.options.flags.mtp_zero_pos0 && s0 == 0);
    std::vector<ForwardResult> results(1);
    results[0].T = T;
    if (o.layer_hidden) keep_hidden(results);
    run_layer(m.cfg.num_hidden_layers, dp, o, results);
    finish(m.weights.mtp[0].norm, m.mtp_head(), o, results);
    seq.mtp.set_length(s0 + T);
    return std::move(results[0]);
  }

  CudaModel m;

 private:
  void check_ids(std::span<const int32_t> ids, int64_t s0) const {
    if (ids.empty())
      throw Error(ExitCode::usage, "a forward pass needs at least one token", name());
    const int64_t length = s0 + static_cast<int64_t>(ids.size());
    if (length > m.room)
      throw Error(ExitCode::usage, "context too long", name(),
                  "at most " + std::to_string(m.room) + " tokens", std::to_string(length));
    for (size_t i = 0; i < ids.size(); ++i)
      if (ids[i] < 0 || ids[i] >= m.cfg.vocab_size)
        throw Error(ExitCode::bad_input, "token id out of range", "position " + std::to_string(i),
                    "0 <= id < " + std::to_string(m.cfg.vocab_size), std::to_string(ids[i]));
  }

  std::vector<float> download(const float* from, int64_t n) const {
    std::vector<float> v(static_cast<size_t>(n));
    cuda_download(v.data(), from, n * 4, m.stream);
    return v;
  }
  void keep_hidden(std::vector<ForwardResult>& results) const {
    const int64_t d = m.cfg.hidden_size;
    for (size_t i = 0; i < results.size(); ++i)
      results[i].layer_hidden.push_back(
          download(m.ws.h.as<float>() + plan_.items[i].first * d, plan_.items[i].T * d));
  }

  void run_layer(int64_t index, const DevicePlan& dp, const ForwardOptions& o,
                 std::vector<ForwardResult>& results) {
    const int64_t K = m.cfg.num_experts_per_tok;
    std::vector<int32_t> idx, served;
    std::vector<float> weight;
    RouteTap tap;
    if (o.routes)
      tap = [&](int64_t, int64_t n, const int32_t* di, const float* dw, const int32_t* ds) {
        const size_t at = idx.size();
        idx.resize(at + static_cast<size_t>(n * K));
        weight.resize(idx.size());
        cuda_download(idx.data() + at, di, n * K * 4, m.stream);
        cuda_download(weight.data() + at, dw, n * K * 4, m.stream);
        if (ds == nullptr) return;
        served.resize(idx.size());
        cuda_download(served.data() + at, ds, n * K * 4, m.stream);
      };
    m.run_layer(index, plan_, dp, tap);
    if (o.layer_hidden) keep_hidden(results);
    if (idx.empty()) return;
    for (size_t i = 0; i < results.size(); ++i) {
      const int64_t from = plan_.items[i].first * K, to = from + plan_.items[i].T * K;
      model::LayerRoutes r;
      r.layer = index, r.K = K;
      r.idx.assign(idx.begin() + from, idx.begin() + to);
      r.weight.assign(weight.begin() + from, weight.begin() + to);
      if (!served.empty())
        for (int64_t k = from; k < to; ++k)
          r.dropped.push_back(served[static_cast<size_t>(k)] < 0 ? 1 : 0);
      results[i].routes.push_back(std::move(r));
    }
  }

  void finish(const float* norm, const DeviceLinear& head, const ForwardOptions& o,
              std::vector<ForwardResult>& results) {
    const int64_t d = m.cfg.hidden_size, V = m.cfg.vocab_size;
    for (size_t i = 0; i < results.size(); ++i) {
      const PassItem& item = plan_.items[i];
      if (o.hidden) {
        m.hidden_rows(norm, item.first, item.T,
                      static_cast<float*>(hidden_.reserve(item.T * d * 4)));
        results[i].hidden = download(hidden_.as<float>(), item.T * d);
      }
      if (o.logits != LogitsOf::all) continue;
      results[i].logits.resize(static_cast<size_t>(item.T * V));
      for (int64_t r0 = 0; r0 < item.T; r0 += kLogitRows) {
        const int64_t rows = std::min(kLogitRows, item.T - r0);
        const float* z = m.logits(norm, head, m.ws.h.as<float>() + (item.first + r0) * d, rows);
        cuda_download(results[i].logits.data() + r0 * V, z, rows * V * 4, m.stream);
      }
    }
    if (o.logits == LogitsOf::last) {
      const auto all = std::span<const PassItem>(plan_.items);
      for (size_t i0 = 0; i0 < all.size(); i0 += static_cast<size_t>(kLogitRows)) {
        const auto part = all.subspan(i0, std::min<size_t>(kLogitRows, all.size() - i0));
        const float* z = m.last_logits(norm, head, part);
        for (size_t i = 0; i < part.size(); ++i)
          results[i0 + i].logits = download(z + static_cast<int64_t>(i) * V, V);
      }
    }
    cuda_synchronize(m.stream);
  }

  Plan plan_;
  DeviceBuffer plan_buffer_, hidden_, mtp_hidden_;
};

}  // namespace

std::unique_ptr<model::Backend> make_cuda_backend(model::WeightsPtr weights, spec::DType compute,
                                                  const model::BackendOptions& options) {
  if (compute != spec::DType::bf16 && compute != spec::DType::f32)
    throw Error(ExitCode::usage, "the CUDA backend computes in bf16 or f32", "--dtype",
                "bf16 or f32", spec::dtype_name(compute));
  if (!cuda_usable()) throw Error(ExitCode::nothing_ran, cuda_device().reason, "CUDA");
  return std::make_unique<CudaBackend>(std::move(weights), compute, options);
}

int64_t cuda_cache_bytes(model::Backend& backend) {
  const CudaModel& m = cuda_model_of(backend);
  return m.main_arena->bytes() + m.mtp_arena->bytes();
}

CudaModel& cuda_model_of(model::Backend& backend) { return dynamic_cast<CudaBackend&>(backend).m; }

}  // namespace v3b::kern
