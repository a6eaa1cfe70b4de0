#include "bench/ops/forward_common.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "bench/harness/cuda_mirror.h"
#include "kernels/attention/attention.h"
#include "kernels/forward/cpu_backend.h"
#include "kernels/forward/cuda_backend.h"
#include "kernels/forward/cuda_replay.h"
#include "model/params.h"
#include "model/rng.h"
#include "reference/forward.h"
#include "reference/spec/attention.h"

namespace v3b::bench {
namespace {

// Beyond so many weights the reference computes in f32 (its error of 1e-6 is nothing beside a bf16 pass's bound) and
// widens experts only while it uses them.
constexpr double kBigModel = 0x1p28;
// The shipped model's routers are not steered: scores nearer to a tie than this may come out the other way in bf16.
constexpr double kShippedGap = 2e-2;
constexpr int64_t kFewRows = 8;  // of the shipped model: no neighbours to look at
constexpr double kSteeredGap = 1e-2;
constexpr uint64_t kShippedSeed = 1;

bool big(const ForwardData& d) {
  return forward_weight_count(d.shape, d.what == ForwardWhat::mtp) > kBigModel;
}

std::unique_ptr<model::Backend> backend_of(const ForwardData& d, const std::string& name) {
  model::BackendOptions o;
  o.flags.kv_format = d.shape.kv_format;
  o.max_context = std::max<int64_t>(512, d.shape.s0 + d.shape.T + 1);
  if (name == "reference_f64") return ref::make_reference_backend<double>(d.weights, o);
  if (name == "reference_f32") return ref::make_reference_backend<float>(d.weights, o);
  if (name.starts_with("cuda")) return kern::make_cuda_backend(d.weights, d.shape.dtype, o);
  return kern::make_cpu_backend(d.weights, d.shape.dtype, o);
}

// The sequences of one backend, filled up to what the pass finds cached.
struct Session {
  std::unique_ptr<model::Backend> backend;
  std::vector<std::unique_ptr<model::Sequence>> seqs;
  std::vector<float> hidden;  // mtp: [T, d] of the rows that the pass consumes
};
constexpr model::ForwardOptions kOut{model::LogitsOf::last, true, false, true};

std::span<const int32_t> ids_of(const ForwardData& d, int64_t b) {
  const int64_t n = d.ids.shape()[1];
  return {d.ids.as<int32_t>() + b * n, size_t(n)};
}
Session start(const ForwardData& d, const std::string& name) {
  const spec::ForwardShape& s = d.shape;
  Session x;
  x.backend = backend_of(d, name);
  for (int64_t b = 0; b < s.B; ++b) {
    x.seqs.push_back(x.backend->new_sequence());
    const auto ids = ids_of(d, b);
    if (s.context == spec::ForwardContext::rows) {
      x.backend->append_rows(*x.seqs.back(), s.s0, forward_rows(s, d.seed, b));
      continue;
    }
    if (d.what != ForwardWhat::mtp) continue;
    const auto r = x.backend->forward(*x.seqs.back(), ids.first(size_t(s.s0 + s.T)), kOut);
    x.hidden.assign(r.hidden.end() - s.T * s.d, r.hidden.end());
    if (s.s0 > 0)
      (void)x.backend->mtp_forward(*x.seqs.back(), ids.subspan(1, size_t(s.s0)),
                                   std::span(r.hidden).first(size_t(s.s0 * s.d)), kOut);
  }
  if (d.what == ForwardWhat::mtp || s.context == spec::ForwardContext::rows || s.s0 == 0) return x;
  std::vector<model::BatchItem> prompts;
  for (int64_t b = 0; b < s.B; ++b)
    prompts.push_back({x.seqs[size_t(b)].get(), ids_of(d, b).first(size_t(s.s0))});
  (void)x.backend->forward_batch(prompts, {model::LogitsOf::none});
  return x;
}
std::vector<model::ForwardResult> run_pass(const ForwardData& d, Session& x) {
  const spec::ForwardShape& s = d.shape;
  std::vector<model::ForwardResult> r;
  if (d.what == ForwardWhat::mtp) {
    r.push_back(x.backend->mtp_forward(
        *x.seqs[0], ids_of(d, 0).subspan(size_t(s.s0 + 1), size_t(s.T)), x.hidden, kOut));
    x.seqs[0]->mtp_truncate(s.s0);
    return r;
  }
  std::vector<model::BatchItem> items;
  for (int64_t b = 0; b < s.B; ++b)
    items.push_back({x.seqs[size_t(b)].get(), ids_of(d, b).subspan(size_t(s.s0), size_t(s.T))});
  r = x.backend->forward_batch(items, kOut);
  for (auto& seq : x.seqs) seq->truncate(s.s0);
  return r;
}
void store(const std::vector<model::ForwardResult>& results, ForwardData& d) {
  const int64_t T = d.shape.T, K = d.shape.K, B = d.shape.B;
  for (int64_t b = 0; b < B; ++b) {
    const auto& r = results[size_t(b)];
    std::copy(r.logits.begin(), r.logits.end(), d.logits.as<float>() + b * d.shape.V);
    std::copy(r.hidden.begin(), r.hidden.end(), d.hidden.as<float>() + b * T * d.shape.d);
    for (size_t l = 0; l < r.routes.size(); ++l)
      std::copy(r.routes[l].idx.begin(), r.routes[l].idx.end(),
                d.routes.as<int32_t>() + (int64_t(l) * B * T + b * T) * K);
  }
}

// The same pass with inputs and results on the device.
std::unique_ptr<kern::CudaReplay> replay_of(const ForwardData& d, const Session& x) {
  const spec::ForwardShape& s = d.shape;
  if (d.what == ForwardWhat::mtp)
    return std::make_unique<kern::CudaReplay>(
        *x.backend, *x.seqs[0], ids_of(d, 0).subspan(size_t(s.s0 + 1), size_t(s.T)), x.hidden);
  std::vector<model::BatchItem> items;
  for (int64_t b = 0; b < s.B; ++b)
    items.push_back({x.seqs[size_t(b)].get(), ids_of(d, b).subspan(size_t(s.s0), size_t(s.T))});
  return std::make_unique<kern::CudaReplay>(*x.backend, items);
}

// cuda_backend: run() is a call from the host, timed_run() the replay's kernels. cuda_graph: both are the captured graph.
Runner device_runner(ForwardData& d, const std::shared_ptr<Session>& x, bool graph,
                     const std::string& range) {
  const std::shared_ptr<kern::CudaReplay> replay = replay_of(d, *x);
  const auto stream = kern::cuda_stream();
  const auto launch = [replay, stream, graph] {
    if (graph)
      replay->launch(stream);
    else
      replay->enqueue(stream);
  };
  if (graph) {
    replay->capture(stream);
  } else {  // buffers grow here, not within a time
    replay->enqueue(stream);
    kern::cuda_synchronize(stream);
    replay->poison(stream);
  }
  const auto on_device = std::make_shared<bool>(false);  // where the last run's outputs are
  Runner r;
  r.resolved_isa = cuda_isa();
  r.run = [=, &d] {
    const kern::NvtxRange nvtx(range.c_str());
    *on_device = graph;
    if (!graph) return store(run_pass(d, *x), d);
    launch();
    kern::cuda_synchronize(stream);
  };
  r.timed_run = [=] {
    const kern::NvtxRange nvtx(range.c_str());
    *on_device = true;
    return kern::cuda_seconds(stream, launch);
  };
  r.poison = [=] { replay->poison(stream); };
  r.fetch = [=, &d] {
    if (*on_device) store(replay->fetch(stream), d);
  };
  return r;
}

int64_t moe_layers(const spec::ForwardShape& s, ForwardWhat what) {
  return what == ForwardWhat::mtp ? 1 : s.L - s.L_d;
}

}  // namespace

void validate_forward(const spec::ForwardShape& s, ForwardWhat what, const char* where) {
  const auto refuse = [where](const char* bad, const std::string& expected, int64_t found) {
    throw Error(ExitCode::usage, bad, where, expected, std::to_string(found));
  };
  if (what == ForwardWhat::mtp && s.B != 1) refuse("'B' is too large", "1", s.B);
  if (s.B > 4096) refuse("'B' is too large", "at most 4096", s.B);
  if (s.L > 256) refuse("'L' is too large", "at most 256", s.L);
  if (s.E > 4096) refuse("'E' is too large", "at most 4096", s.E);
  if (what != ForwardWhat::mtp && s.L_d >= s.L)
    refuse("no layer has experts", "L_d below L", s.L_d);
  model::ModelConfig c;
  try {
    c = forward_config(s, what == ForwardWhat::mtp);
  } catch (const Error& e) {  // its rules are those of a file; here a flag is wrong
    throw Error(ExitCode::usage, e.what(), where);
  }
  if (s.M > 0 && (s.K + s.M - 1) / s.M > s.E / s.G)
    refuse("the chosen groups hold too few experts", "ceil(K / M) <= E / G", s.K);
  // In doubles: nothing of this size may overflow.
  if (s.context == spec::ForwardContext::rows && (s.s0 < 1 || what == ForwardWhat::mtp))
    refuse("nothing to make rows of", "s0 >= 1, and no MTP", s.s0);
  constexpr double kMostWeights = 0x1p34;
  const double weights = forward_weight_count(s, what == ForwardWhat::mtp);
  if (!(weights <= kMostWeights))
    throw Error(ExitCode::usage, "the model is too large", where, "at most 2^34 weights",
                std::to_string(weights));
}

std::unique_ptr<ForwardData> make_forward_data(const spec::ForwardShape& s, ForwardWhat what,
                                               uint64_t seed) {
  if (s.B < 1 || s.T < 1 || s.s0 < 0 || (what == ForwardWhat::mtp && s.B != 1))
    throw Error(ExitCode::usage, "bad sizes", "--case of a forward op",
                "B >= 1 (mtp_module: 1), T >= 1, s0 >= 0");
  auto d = std::make_unique<ForwardData>();
  d->shape = s;
  d->what = what;
  // The shipped model's tokens and rows are the same for every seed.
  d->seed = s.weights == spec::ForwardWeights::tiny_v3 ? kShippedSeed : seed;
  d->weights = forward_weights(s, what == ForwardWhat::mtp);
  const int64_t n = s.s0 + s.T + (what == ForwardWhat::mtp ? 1 : 0), rows = s.B * s.T;
  d->ids = HostTensor("ids", Role::input, spec::DType::i32, {s.B, n});
  for (int64_t i = 0; i < s.B * n; ++i)
    d->ids.set(i, double(model::rng_below({d->seed, 1}, uint64_t(i), s.V)));
  d->logits = HostTensor("logits", Role::output, spec::DType::f32, {s.B, s.V});
  d->hidden = HostTensor("hidden", Role::output, spec::DType::f32, {rows, s.d});
  d->routes =
      HostTensor("routes", Role::output, spec::DType::i32, {moe_layers(s, what), rows, s.K});
  return d;
}

Expected forward_reference(const ForwardData& d) {
  Session x = start(d, big(d) ? "reference_f32" : "reference_f64");
  const auto results = run_pass(d, x);
  const int64_t rows = d.shape.T, K = d.shape.K, layers = moe_layers(d.shape, d.what);
  const bool shipped = d.shape.weights == spec::ForwardWeights::tiny_v3;
  ExpectedTensor logits{.name = "logits"}, hidden{.name = "hidden"}, routes{.name = "routes"};
  routes.route_k = K;
  // Scores of the steered routers are 0.9 apart; bf16 hidden states move them by 1e-2 at most.
  routes.route_gap_bound = d.shape.dtype != spec::DType::bf16 ? 1e-5
                           : shipped                          ? kShippedGap
                                                              : kSteeredGap;
  std::vector<float> least(size_t(d.shape.B * rows), 1.0F);  // gap of a row in the layers so far
  for (const auto& r : results) {
    logits.values.insert(logits.values.end(), r.logits.begin(), r.logits.end());
    hidden.values.insert(hidden.values.end(), r.hidden.begin(), r.hidden.end());
  }
  for (int64_t l = 0; l < layers; ++l) {
    for (size_t b = 0; b < results.size(); ++b) {
      const auto& q = results[b].routes[size_t(l)];
      routes.values.insert(routes.values.end(), q.idx.begin(), q.idx.begin() + rows * K);
      for (int64_t t = 0; t < rows; ++t) {
        float& gap = least[b * size_t(rows) + size_t(t)];
        // What flipped in one layer has other inputs in the next.
        gap = shipped ? std::min(gap, q.gap[size_t(t)]) : q.gap[size_t(t)];
        routes.route_gap.push_back(gap);
      }
    }
  }
  if (shipped) {  // rows that come near a tie anywhere are known from the reference alone, and not judged
    hidden.skip.assign(hidden.values.size(), 0);
    logits.skip.assign(logits.values.size(), 0);
    const auto near_tie = [&](int64_t row) {
      return least[static_cast<size_t>(row)] < routes.route_gap_bound;
    };
    // Where fewer than an eighth of the rows would be left, all are judged: a check of too few proves nothing.
    int64_t ties = 0, last_ties = 0;
    for (int64_t i = 0; i < d.shape.B * rows; ++i) ties += near_tie(i);
    for (int64_t b = 0; b < d.shape.B; ++b) last_ties += near_tie((b + 1) * rows - 1);
    for (int64_t i = 0; i < d.shape.B * rows && 8 * ties <= 7 * d.shape.B * rows; ++i)
      if (near_tie(i)) std::fill_n(hidden.skip.begin() + i * d.shape.d, d.shape.d, uint8_t{1});
    for (int64_t b = 0; b < d.shape.B && 8 * last_ties <= 7 * d.shape.B; ++b)
      if (near_tie((b + 1) * rows - 1))
        std::fill_n(logits.skip.begin() + b * d.shape.V, d.shape.V, uint8_t{1});
  }
  Expected e;
  e.tensors.push_back(std::move(logits));
  e.tensors.push_back(std::move(hidden));
  e.tensors.push_back(std::move(routes));
  return e;
}

Cost forward_cost(const spec::ForwardShape& s, ForwardWhat what) {
  const model::ModelConfig c = forward_config(s, what == ForwardWhat::mtp);
  const double rows = double(s.B * s.T), e = double(spec::dtype_bytes(s.dtype)),
               s1 = double(s.s0 + s.T);
  // FP8 experts stay FP8 where the pass computes in bf16; the other matrices are widened once, when they are packed.
  const bool fp8 = s.w_dtype == spec::DType::f8e4m3 && s.dtype == spec::DType::bf16;
  const double expert_e = fp8 ? 1 + 4.0 / (128 * 128) : e;
  const int64_t first = what == ForwardWhat::mtp ? s.L : 0,
                layers = what == ForwardWhat::mtp ? 1 : s.L;
  const double head = double(s.V) * double(s.d),
               row_bytes = double(spec::mla_cache_row_bytes(s.kv_format, s.dtype, s.d_c, s.d_r));
  double flop = 2 * head * double(s.B), bytes = head * e + 2 * rows * double(s.d) * 4;
  for (int64_t l = first; l < first + layers; ++l) {
    const model::LayerParams p = model::layer_params(c, l);
    flop += 2 * rows * double(p.active() - p.norms - p.bias);
    const double distinct = p.experts > 0 ? model::expected_distinct_experts(c, s.B * s.T) : 0;
    bytes += e * double(p.attention + p.dense_ffn) +
             expert_e * (double(p.shared) + distinct * double(p.expert)) + 4 * double(p.gate);
    const double pairs =
        double(s.B) * (double(s.T) * double(s.s0) + double(s.T) * double(s.T + 1) / 2);
    const bool absorbed = s.T < 5 || (s.s0 > 0 && s.T <= 64);
    flop +=
        2 * double(s.n_h) * pairs * double(absorbed ? 2 * s.d_c + s.d_r : s.d_n + s.d_r + s.d_v);
    bytes += double(s.B) * s1 * row_bytes;
  }
  if (what == ForwardWhat::mtp) {
    flop += 4 * rows * double(s.d) * double(s.d);
    bytes += 2 * double(s.d) * double(s.d) * e;
  }
  // Written: logits, hidden states and the new rows of the caches.
  const double written =
      4 * (double(s.B) * double(s.V) + rows * double(s.d)) + rows * row_bytes * double(layers);
  return {flop, bytes, s.dtype == spec::DType::bf16 ? "bf16" : "f32", std::min(written, bytes)};
}

Tolerance forward_tolerance(const spec::ForwardShape& s, ForwardWhat what,
                            const std::string& output) {
  if (output == "routes") return {};
  // Far below SPEC 0.6's whole-model bounds (F32 1e-4, BF16 3e-2), so that a wrong attention shows:
  // the class vectors dominate the residual stream, and a rounding at full size is what one addition
  // to it comes to at most: 2^-8 / sqrt(12) = 1.13e-3 RMS of the power of two below. Two additions a layer and the final
  // norm, independent, make 1.13e-3 sqrt(2L + 1), and half as much again for outputs of one row, 1.7e-3 (measured: up to
  // 1.24e-3). The MTP row's stream starts from a product instead of an embedding, where nothing dominates: 1e-2, of which
  // small models take 6.4e-3. An element is within six deviations.
  const bool bf16 = s.dtype == spec::DType::bf16;
  if (s.weights == spec::ForwardWeights::tiny_v3 && bf16) {
    // Nothing dominates a trained model's stream: SPEC 0.6's bound for a whole model, an element within six deviations.
    // Of many rows some look at a neighbour near a tie that took another expert; their elements may be half an RMS off.
    const int64_t rows = output == "logits" ? s.B : s.B * s.T;
    return {.rel_fro = 3e-2, .abs_rms = rows < kFewRows ? 6 * 3e-2 : 0.5};
  }
  const double rounds = std::sqrt(2 * double(s.L) + 1), fp8 = 3e-2;
  const double fro =
      what == ForwardWhat::mtp ? (bf16 ? 1e-2 : 3e-6) : (bf16 ? 1.7e-3 : 1e-6) * rounds;
  const double bound = fro + (s.kv_format == spec::KvFormat::bf16 ? 0 : fp8);
  return {.rel_fro = bound, .abs_rms = 6 * bound};
}

Runner forward_runner(ForwardData& d, const std::string& backend) {
  auto x = std::make_shared<Session>(start(d, backend));
  if (backend.starts_with("cuda")) {
    static const char* names[] = {"forward_prefill", "forward_decode", "mtp_module"};
    return device_runner(d, x, backend == "cuda_graph",
                         names[int(d.what)] + std::string(".") + backend);
  }
  return {
      .run = [&d, x] { store(run_pass(d, *x), d); },
      .resolved_isa = backend == "cpu" ? kern::attention_cpu_simd_isa(d.shape.dtype) : "baseline"};
}

Support forward_support(const spec::ForwardShape& s, const std::string& backend) {
  if (s.dtype != spec::DType::bf16 && s.dtype != spec::DType::f32)
    return {Support::State::unsupported, "computes in bf16 or f32"};
  if (backend.starts_with("cuda")) {
    if (s.context == spec::ForwardContext::rows)
      return {Support::State::unsupported, "the CUDA backend takes no cache rows yet"};
    // FLOP of all passes of a check, prefill of the cached rows included; the emulation has about 1 GFLOP/s.
    const Support here = cuda_support();
    if (here.state != Support::State::yes) return here;
    return cuda_emulation_limit(2 * double(s.B) * double(s.s0 + s.T) * double(s.L) * double(s.d) *
                                double(4 * s.d + 3 * (s.K + s.N_s) * s.m));
  }
  if (backend == "reference_f32" &&
      (s.B * s.T * s.d * s.L > int64_t{1} << 22 || forward_weight_count(s, false) > kBigModel))
    return {Support::State::unsupported, "the plain form would take minutes"};
  return {};
}

}  // namespace v3b::bench
