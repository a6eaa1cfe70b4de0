#include "kernels/forward/cuda_model.h"

#include <algorithm>
#include <string>

#include "kernels/forward/forward_glue_cuda.h"
#include "model/error.h"
#include "model/router_config.h"
#include "reference/spec/attention.h"

namespace v3b::kern {

CudaModel::CudaModel(model::WeightsPtr w, spec::DType d, const model::BackendOptions& o)
    : options(o),
      cfg(w->config),
      dtype(d),
      room(o.max_context > 0 ? o.max_context : w->config.max_position_embeddings),
      stream(cuda_stream()) {
  dynamic_rope = cfg.rope_scaling.type == model::RopeType::dynamic || cfg.rope_scaling.dynamic;
  weights = upload_model(cfg, pack_model(w, d, o.flags.router_dtype != spec::RouterDtype::fp32));
  const int64_t row =
      spec::mla_cache_row_bytes(o.flags.kv_format, d, cfg.kv_lora_rank, cfg.qk_rope_head_dim);
  main_pool = std::make_shared<PagePool>(cfg.num_hidden_layers, o.page_size, row, room);
  mtp_pool = std::make_shared<PagePool>(1, o.page_size, row, room);
  main_arena = std::make_unique<CudaArena>(cfg.num_hidden_layers, o.page_size, row);
  mtp_arena = std::make_unique<CudaArena>(1, o.page_size, row);
  router_ = model::router_config(cfg, o.flags);
  use_bias_ = model::router_uses_bias(cfg, o.flags);
  freqs_ = model::rope_freqs(cfg, o.flags, dynamic_rope ? 1 : room);
}

void CudaModel::extend_rope(int64_t n) {
  if (rope_positions_ >= n) return;
  const int64_t positions =
      std::max(n, std::min(room, std::max<int64_t>(2 * rope_positions_, 512)));
  const model::RopeTable t = model::make_rope_table(freqs_, 0, positions);
  const int64_t size = static_cast<int64_t>(t.cos.size()) * 4;
  cuda_synchronize(stream);
  cos_ = DeviceBuffer(size), sin_ = DeviceBuffer(size);
  cuda_upload(cos_.data(), t.cos.data(), size, stream);
  cuda_upload(sin_.data(), t.sin.data(), size, stream);
  rope_positions_ = positions;
}

void CudaModel::rotate_for(PagedSequence& seq, int64_t length) {
  const model::RopeFreqs now = model::rope_freqs(cfg, options.flags, length);
  const auto differ = [&](const model::RopeFreqs& f) {
    return now.inv_freq != f.inv_freq || now.cos_sin_multiplier != f.cos_sin_multiplier;
  };
  if ((seq.main.length() > 0 || seq.mtp.length() > 0) && differ(seq.freqs))
    throw Error(ExitCode::usage, "dynamic RoPE scaling changes the rotation of cached keys", "CUDA",
                "the whole sequence in one call (or the reference backend)",
                "a call that grows the context to " + std::to_string(length));
  seq.freqs = now;
  if (differ(freqs_)) rope_positions_ = 0;
  freqs_ = now;
}

DevicePlan CudaModel::upload_plan(Plan& plan, int64_t longest, CudaArena& arena,
                                  const std::vector<int32_t>& ids, DeviceBuffer& buffer) {
  extend_rope(longest);
  make_plan(cfg, options.absorbed_prefill, plan);
  DevicePlan dp;
  dp.rows = plan.rows;
  dp.page = plan.items[0].track->pool().page();
  std::vector<int32_t> all;
  const auto add = [&](const std::vector<int32_t>& v) {
    const size_t at = all.size();
    all.insert(all.end(), v.begin(), v.end());
    return at;
  };
  const size_t positions = add(plan.positions), slots = add(plan.slots), tables = add(plan.tables),
               seqlens = add(plan.seqlens), tokens = add(ids);
  std::vector<size_t> item_at;
  int32_t most = -1;
  for (const PassItem& item : plan.items) {
    item_at.push_back(add(item.track->blocks()));
    for (const int32_t b : item.track->blocks()) most = std::max(most, b);
  }
  arena.ensure(most + 1);
  auto* base = static_cast<int32_t*>(buffer.reserve(static_cast<int64_t>(all.size()) * 4));
  cuda_upload(base, all.data(), static_cast<int64_t>(all.size()) * 4, stream);
  dp.positions = base + positions, dp.slots = base + slots, dp.tables = base + tables,
  dp.seqlens = base + seqlens, dp.ids = base + tokens;
  for (const size_t at : item_at) dp.item_tables.push_back(base + at);
  return dp;
}

void CudaModel::embed(const DeviceLinear& table, int64_t rows, const int32_t* ids, float* h) {
  embed_f32_cuda_simt(rows, cfg.hidden_size, table.out, ids, table.data, dtype, h, stream);
}

void CudaModel::run_layer(int64_t index, const Plan& plan, const DevicePlan& dp,
                          const RouteTap& routes) {
  const bool mtp = index == cfg.num_hidden_layers;
  const DeviceLayer& p = mtp ? weights.mtp[0].layer : weights.layers[static_cast<size_t>(index)];
  const CudaLayerContext ctx{cfg,
                             options.flags,
                             dtype,
                             router_,
                             use_bias_,
                             cos_.as<float>(),
                             sin_.as<float>(),
                             freqs_.softmax_scale,
                             options.capacity_factor};
  run_attention_cuda(ctx, p, mtp ? mtp_arena->layer(0) : main_arena->layer(index), plan, dp, ws,
                     stream);
  run_ffn_cuda(ctx, p, dp.rows, ws, routes, stream);
}

void CudaModel::hidden_rows(const float* norm, int64_t first, int64_t n, float* out) {
  const int64_t d = cfg.hidden_size;
  const float* h = ws.h.as<float>() + first * d;
  if (options.flags.mtp_hidden == spec::MtpHidden::pre_norm) {
    cuda_copy(out, h, n * d * 4, stream);
    return;
  }
  rmsnorm_mixed_cuda_simt({n, d, cfg.rms_norm_eps, options.flags.norm_rounding, spec::DType::f32,
                           spec::DType::f32, spec::DType::f32, h, d, norm, out, d},
                          stream);
}

float* CudaModel::logits(const float* norm, const DeviceLinear& head, const float* h, int64_t n) {
  const int64_t d = cfg.hidden_size, V = cfg.vocab_size;
  ws.x.reserve(n * d * spec::dtype_bytes(dtype));
  rmsnorm_mixed_cuda_simt({n, d, cfg.rms_norm_eps, options.flags.norm_rounding, spec::DType::f32,
                           spec::DType::f32, dtype, h, d, norm, ws.x.data(), d},
                          stream);
  ws.logits.reserve(n * V * 4);
  linear_cuda(dtype, head, n, ws.x.data(), d, ws.logits.data(), V, spec::DType::f32, stream);
  return ws.logits.as<float>();
}

float* CudaModel::last_logits(const float* norm, const DeviceLinear& head,
                              std::span<const PassItem> items) {
  const int64_t d = cfg.hidden_size, n = static_cast<int64_t>(items.size());
  auto* last = static_cast<float*>(ws.last.reserve(n * d * 4));
  const bool equal =
      std::all_of(items.begin(), items.end(), [&](const PassItem& i) { return i.T == items[0].T; });
  const auto row = [&](size_t i) {
    return ws.h.as<float>() + (items[i].first + items[i].T - 1) * d;
  };
  if (equal)
    copy_rows_cuda_simt(n, d, row(0), spec::DType::f32, items[0].T * d, last, spec::DType::f32, d,
                        stream);
  else
    for (size_t i = 0; i < items.size(); ++i)
      cuda_copy(last + static_cast<int64_t>(i) * d, row(i), d * 4, stream);
  return logits(norm, head, last, n);
}

const DeviceLinear& CudaModel::mtp_head() const {
  const DeviceLinear& own = weights.mtp[0].own_head;
  return own.out > 0 ? own : weights.head_or_embed();
}

}  // namespace v3b::kern
