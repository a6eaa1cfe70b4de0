// What the ops forward_prefill, forward_decode and mtp_module share: a model whose routes no
// rounding can flip, its inputs, outputs and cost.
#pragma once
#include <memory>
#include <string>
#include <vector>

#include "bench/harness/op.h"
#include "model/backend.h"
#include "reference/spec/forward.h"

namespace v3b::bench {

enum class ForwardWhat { prefill, decode, mtp };

struct ForwardData {
  spec::ForwardShape shape;
  ForwardWhat what = ForwardWhat::prefill;
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
model::ModelConfig forward_config(const spec::ForwardShape& s);
// Random weights, but a token's class decides its experts: a class vector dominates its embedding,
// and each router answers it with K experts of M groups at scores near 1, all others near 0. A bf16
// pass then takes the very routes of the float64 reference, every row can be judged, and loads are
// even.
std::unique_ptr<ForwardData> make_forward_data(const spec::ForwardShape& s, ForwardWhat what,
                                               uint64_t seed);
Expected forward_reference(const ForwardData& d);
Cost forward_cost(const spec::ForwardShape& s, ForwardWhat what);
Tolerance forward_tolerance(const spec::ForwardShape& s, ForwardWhat what,
                            const std::string& output);
// Backend by name on these data: what is cached already is computed in prepare, run() is the pass
// alone.
Runner forward_runner(ForwardData& d, const std::string& backend);
Support forward_support(const spec::ForwardShape& s, const std::string& backend);

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
