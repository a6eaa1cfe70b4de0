// Router selection: everything the suite knows about this op.
#include "reference/router.h"

#include <vector>

#include "bench/harness/cuda_mirror.h"
#include "bench/harness/op.h"
#include "bench/ops/registry.h"
#include "kernels/moe/moe.h"
#include "kernels/moe/moe_cuda.h"

namespace v3b::bench {

V3B_ENUM_TEXT(spec::Scoring, {sigmoid, "sigmoid"}, {softmax, "softmax"})
V3B_ENUM_TEXT(spec::GroupRule, {none, "none"}, {top2_sum, "top2_sum"}, {max, "max"})

namespace {

constexpr double kGapBound = 1e-6;  // SPEC 0.1, fp32 scores

struct Router {
  static constexpr const char* name = "router";
  using Shape = spec::RouterShape;
  struct Data {
    Shape shape;
    HostTensor logits, bias, idx, weight, scores;
    std::vector<HostTensor*> tensors() {
      std::vector<HostTensor*> t{&logits, &idx, &weight, &scores};
      if (shape.bias) t.push_back(&bias);
      return t;
    }
    spec::RouterSelectArgs args() {
      return {config(shape),      shape.T,
              logits.as<float>(), shape.bias ? bias.as<float>() : nullptr,
              idx.as<int32_t>(),  weight.as<float>(),
              scores.as<float>()};
    }
  };
  static spec::RouterConfig config(const Shape& s) {
    return {.E = s.E,
            .K = s.K,
            .G = s.G,
            .M = s.M,
            .scoring = s.scoring,
            .group_rule = s.group_rule,
            .norm_topk_prob = s.norm_topk_prob,
            .c_r = s.c_r,
            .router_mask = s.router_mask,
            .gate_eps = s.gate_eps};
  }
  static void validate(const Shape& s) {
    const auto refuse = [](const char* what, const char* expected) {
      throw Error(ExitCode::usage, what, "--case of router", expected, "");
    };
    if (s.dtype != spec::DType::f32) refuse("logits have no such dtype", "dtype=f32");
    if (s.T < 1 || s.E < 1 || s.E > 1024) refuse("size out of range", "T >= 1, 1 <= E <= 1024");
    if (s.K < 1 || s.K > s.E) refuse("K out of range", "1 <= K <= E");
    if (s.group_rule == spec::GroupRule::none) return;
    if (s.G < 1 || s.E % s.G != 0 || s.M < 1 || s.M > s.G)
      refuse("groups do not fit", "G divides E, 1 <= M <= G");
    if (s.K > s.M * (s.E / s.G)) refuse("K exceeds the kept groups", "K <= M*E/G");
    if (s.group_rule == spec::GroupRule::top2_sum && s.E / s.G < 2)
      refuse("group too small", "E/G >= 2");
  }
  static std::unique_ptr<Data> make(const Shape& s, Fill, uint64_t seed) {
    validate(s);
    auto d = std::make_unique<Data>();
    d->shape = s;
    using enum spec::DType;
    d->logits = HostTensor("logits", Role::input, f32, {s.T, s.E});
    d->idx = HostTensor("idx", Role::output, i32, {s.T, s.K});
    d->weight = HostTensor("weight", Role::output, f32, {s.T, s.K});
    d->scores = HostTensor("scores", Role::output, f32, {s.T, s.E});
    d->logits.fill_real(seed, 1.0, false);
    if (s.bias) {
      d->bias = HostTensor("bias", Role::input, f32, {s.E});
      d->bias.fill_real(seed + 1, 0.1, false);
    }
    return d;
  }
  static Expected reference(const Data& d) {
    const Shape& s = d.shape;
    const auto z = d.logits.to_doubles();
    const auto b = s.bias ? d.bias.to_doubles() : std::vector<double>{};
    auto r = ref::route<double>(config(s), s.T, z.data(), s.bias ? b.data() : nullptr);
    Expected e;
    ExpectedTensor idx{.name = "idx", .values = {r.idx.begin(), r.idx.end()}};
    idx.route_k = s.K;
    idx.route_gap = r.gap;
    idx.route_gap_bound = kGapBound;
    idx.follow = {"weight"};
    e.tensors.push_back(std::move(idx));
    e.tensors.push_back({.name = "weight", .values = std::move(r.weight)});
    e.tensors.push_back({.name = "scores", .values = std::move(r.scores)});
    return e;
  }
  static Cost cost(const Shape& s) {
    // An exponential, an addition and a division a score; comparisons are not counted.
    const double n = double(s.T) * double(s.E);
    const double chosen = 8 * double(s.T) * double(s.K);
    return {3 * n, 8 * n + chosen, "f32", 4 * n + chosen};
  }
  static Tolerance tolerance(const Shape& s, Fill, const std::string&) {
    // Softmax: z - max is rounded at up to ~10 (2^-21), which exp turns into a relative error.
    const double rel = s.scoring == spec::Scoring::softmax ? 3e-6 : 1e-6;
    return {.rel_fro = rel, .rel = 2 * rel, .abs = 1e-30};
  }
  static std::vector<Case<Shape>> cases() {
    using enum spec::GroupRule;
    const auto softmax = spec::Scoring::softmax;
    std::vector<Case<Shape>> c;
    c.push_back({{.T = 512}, Size::quick, false, CacheState::hot});
    c.push_back({{.T = 1}, Size::quick, false, CacheState::hot});
    c.push_back({{.T = 512, .E = 16, .K = 4, .G = 4, .M = 2},
                 Size::standard,
                 false,
                 CacheState::hot});  // tiny-v3
    c.push_back({{.T = 512, .E = 384, .G = 1, .M = 1, .group_rule = none, .c_r = 2.827},
                 Size::standard,
                 false,
                 CacheState::hot});  // Kimi-K2
    c.push_back({{.T = 512,
                  .E = 64,
                  .K = 6,
                  .G = 1,
                  .M = 1,
                  .scoring = softmax,
                  .group_rule = none,
                  .norm_topk_prob = false,
                  .c_r = 1,
                  .bias = false},
                 Size::standard,
                 false,
                 CacheState::hot});  // V2-Lite
    c.push_back({{.T = 512,
                  .E = 160,
                  .K = 6,
                  .G = 8,
                  .M = 3,
                  .scoring = softmax,
                  .group_rule = max,
                  .norm_topk_prob = false,
                  .c_r = 16,
                  .bias = false},
                 Size::full,
                 false,
                 CacheState::hot});  // V2
    c.push_back({{.T = 8192}, Size::full, false, CacheState::cold});
    c.push_back({{.T = 37, .E = 20, .K = 5, .G = 5, .M = 3, .router_mask = spec::RouterMask::zero},
                 Size::quick,
                 true});
    c.push_back({{.T = 9,
                  .E = 33,
                  .K = 1,
                  .G = 1,
                  .M = 1,
                  .scoring = softmax,
                  .group_rule = none,
                  .c_r = 1,
                  .bias = false},
                 Size::quick,
                 true});  // Switch
    c.push_back({{.T = 7, .E = 12, .K = 3, .G = 3, .M = 2, .gate_eps = spec::GateEps::zero},
                 Size::quick,
                 true});
    return c;
  }
  static std::vector<Impl<Router>> impls() {
    std::vector<Impl<Router>> v;
    v.push_back({.how = "cpu_simd",
                 .prepare =
                     [](Data& d) {
                       return Runner{.run = [a = d.args()] { kern::router_select_cpu_simd(a); },
                                     .resolved_isa = kern::router_select_cpu_simd_isa()};
                     },
                 .levels = {kern::Isa::avx2, kern::Isa::avx512}});
    v.push_back(cuda_impl<Router>(
        "cuda_simt",
        [](const Shape& s) {
          if (s.E <= kern::kRouterMaxExperts && s.K <= kern::kRouterMaxK) return Support{};
          return Support{Support::State::unsupported, "more than 1024 experts or K > 32"};
        },
        [](Data& d, CudaMirror& m) {
          auto a = d.args();
          m.map(a.logits, a.bias, a.idx, a.weight, a.scores);
          return [a](kern::CudaStream stream) { kern::router_cuda_simt(a, stream); };
        }));
    v.push_back({"cpu_eigen", nullptr,
                 [](Data& d) {
                   return Runner{
                       .run =
                           [&d] {
                             const Shape& s = d.shape;
                             const auto r =
                                 ref::route<float>(config(s), s.T, d.logits.as<float>(),
                                                   s.bias ? d.bias.as<float>() : nullptr);
                             std::copy(r.idx.begin(), r.idx.end(), d.idx.as<int32_t>());
                             std::copy(r.weight.begin(), r.weight.end(), d.weight.as<float>());
                             std::copy(r.scores.begin(), r.scores.end(), d.scores.as<float>());
                           },
                       .resolved_isa = "baseline"};
                 },
                 true});
    return v;
  }
};

}  // namespace

std::unique_ptr<OpBase> make_router_op() { return make_op<Router>(); }

}  // namespace v3b::bench
