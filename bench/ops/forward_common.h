// What the ops forward_prefill, forward_decode and mtp_module share: a model whose routes no
// rounding can flip, its inputs, outputs and cost.
#pragma once
#include <memory>
#include <string>
#include <vector>

#include "bench/harness/op.h"
#include "bench/ops/forward_weights.h"
#include "model/backend.h"
#include "reference/spec/forward.h"

namespace v3b::bench {

enum class ForwardWhat { prefill, decode, mtp };

struct ForwardData {
  spec::ForwardShape shape;
  ForwardWhat what = ForwardWhat::prefill;
  uint64_t seed = 1;
  model::WeightsPtr weights;
  HostTensor ids;     // [B, s0 + T] (mtp: + 1, the token after the last)
  HostTensor logits;  // [B, V] of each sequence's last row
  HostTensor hidden;  // [B * T, d] after the final norm
  HostTensor routes;  // [MoE layers, B * T, K]
  std::vector<HostTensor*> tensors() { return {&ids, &logits, &hidden, &routes}; }
};

// Throws Error(usage): batch, layers, types, what the configuration's own rules refuse, or a model of more
// weights than a bench makes.
void validate_forward(const spec::ForwardShape& s, ForwardWhat what, const char* where);
// Weights and made-up contexts: forward_weights.h.
std::unique_ptr<ForwardData> make_forward_data(const spec::ForwardShape& s, ForwardWhat what,
                                               uint64_t seed);
// Float64 on the same weights, in f32 for models of more than 2^28 weights. weights=tiny_v3: rows whose scores come nearer
// to a tie than 2e-2 in any layer of the reference are not judged, unless an output has fewer than 8 rows: then all are,
// with room for one other expert. What proves the kernels is the steered model; this one proves that they read the
// checkpoint.
Expected forward_reference(const ForwardData& d);
Cost forward_cost(const spec::ForwardShape& s, ForwardWhat what);
Tolerance forward_tolerance(const spec::ForwardShape& s, ForwardWhat what,
                            const std::string& output);
// Backend by name on these data: what is cached already is computed in prepare, run() is the pass
// alone.
Runner forward_runner(ForwardData& d, const std::string& backend);
Support forward_support(const spec::ForwardShape& s, const std::string& backend);

// Sizes that the ops' lists share, of one token at no context. The shipped model; DeepSeek-V2-Lite's widths (with this
// project's gate: sigmoid scores, no groups) seven layers deep, 7.5 GiB; a single layer of V3 with 64 of its 256 experts,
// 6.4 GiB in bf16, or 128 of them in FP8, 6.3 GiB, with a small vocabulary.
inline spec::ForwardShape tiny_v3_shape() {
  spec::ForwardShape s;
  s.m = 80;
  s.weights = spec::ForwardWeights::tiny_v3;
  s.context = spec::ForwardContext::rows;
  return s;
}
inline spec::ForwardShape v2_lite_shape() {
  spec::ForwardShape s;
  s.L = 7, s.L_d = 1, s.d = 2048, s.n_h = 16, s.d_n = 128, s.d_r = 64, s.d_v = 128, s.d_q = 0;
  s.d_c = 512, s.f = 10944, s.m = 1408, s.E = 64, s.N_s = 2, s.K = 6, s.G = 1, s.M = 1;
  s.V = 102400;
  s.context = spec::ForwardContext::rows;
  return s;
}
inline spec::ForwardShape v3_layer_shape(spec::DType w_dtype) {
  spec::ForwardShape s;
  s.L = 1, s.L_d = 0, s.d = 7168, s.n_h = 128, s.d_n = 128, s.d_r = 64, s.d_v = 128, s.d_q = 1536;
  s.d_c = 512, s.m = 2048, s.E = w_dtype == spec::DType::bf16 ? 64 : 128, s.N_s = 1, s.K = 8;
  s.G = 8, s.M = 4;
  s.w_dtype = w_dtype;
  s.context = spec::ForwardContext::rows;
  return s;
}

// The declaration that the three ops share (DESIGN 2). What gives its name, what a pass of it is
// (ForwardWhat) and its cases.
template <class What>
struct ForwardOp {
  static constexpr const char* name = What::name;
  using Shape = spec::ForwardShape;
  using Data = ForwardData;
  static void validate(const Shape& s) {
    validate_forward(s, What::what, (std::string("--case of ") + name).c_str());
  }
  static std::unique_ptr<Data> make(const Shape& s, Fill, uint64_t seed) {
    return make_forward_data(s, What::what, seed);
  }
  static Expected reference(const Data& d) { return forward_reference(d); }
  static Cost cost(const Shape& s) { return forward_cost(s, What::what); }
  static Tolerance tolerance(const Shape& s, Fill, const std::string& output) {
    return forward_tolerance(s, What::what, output);
  }
  static std::vector<Case<Shape>> cases() { return What::cases(); }
  static std::vector<Impl<ForwardOp>> impls() {
    std::vector<Impl<ForwardOp>> v;
    v.push_back({"cpu_backend", [](const Shape& s) { return forward_support(s, "cpu"); },
                 [](Data& d) { return forward_runner(d, "cpu"); }});
    // Checked from call to result on the host; timed by events, inputs and results on the device.
    v.push_back({"cuda_backend", [](const Shape& s) { return forward_support(s, "cuda_backend"); },
                 [](Data& d) { return forward_runner(d, "cuda_backend"); }});
    if (What::what == ForwardWhat::decode)  // the step as the decode loop has it
      v.push_back({"cuda_graph", [](const Shape& s) { return forward_support(s, "cuda_graph"); },
                   [](Data& d) { return forward_runner(d, "cuda_graph"); }});
    v.push_back({"cpu_eigen", [](const Shape& s) { return forward_support(s, "reference_f32"); },
                 [](Data& d) { return forward_runner(d, "reference_f32"); }, true});
    return v;
  }
};

}  // namespace v3b::bench
