// Backward of a top-k selection: everything the suite knows about this op. Data movement: bitwise.
#include "kernels/gemm/topk_backward.h"

#include <vector>

#include "bench/harness/cuda_mirror.h"
#include "bench/harness/op.h"
#include "bench/ops/registry.h"
#include "kernels/gemm/rows_cuda.h"
#include "reference/topk.h"

namespace v3b::bench {
namespace {

using spec::DType;

struct TopkBackward {
  static constexpr const char* name = "topk_backward";
  using Shape = spec::TopkBackwardShape;

  struct Data {
    Shape shape;
    HostTensor idx, dy, ds;
    std::vector<HostTensor*> tensors() { return {&idx, &dy, &ds}; }
  };

  static void validate(const Shape& s) {
    if (s.K > s.E || s.K < 1)
      throw Error(ExitCode::usage, "bad value for 'K'", "--case of topk_backward", "1..E",
                  std::to_string(s.K));
  }
  static std::unique_ptr<Data> make(const Shape& s, Fill, uint64_t seed) {
    auto d = std::make_unique<Data>();
    d->shape = s;
    d->idx = HostTensor("idx", Role::input, DType::i32, {s.T, s.K});
    d->dy = HostTensor("dy", Role::input, DType::f32, {s.T, s.E});
    d->ds = HostTensor("ds", Role::output, DType::f32, {s.T, s.E});
    d->dy.fill_real(seed);
    HostTensor scores("scores", Role::input, DType::f32, {s.T, s.E});
    scores.fill_real(seed + 1, 1.0, false);
    ref::topk_select<float>(s.T, s.E, s.K, scores.as<float>(), d->idx.as<int32_t>(), nullptr);
    return d;
  }

  static Expected reference(const Data& d) {
    const Shape& s = d.shape;
    const std::vector<double> dy = d.dy.to_doubles();
    ExpectedTensor ds{.name = "ds"};
    ds.values.resize(dy.size());
    ref::topk_backward<double>(s.T, s.E, s.K, d.idx.as<int32_t>(), dy.data(), ds.values.data(),
                               s.ste);
    Expected e;
    e.tensors.push_back(std::move(ds));
    return e;
  }

  static Cost cost(const Shape& s) {
    const double te = double(s.T) * double(s.E), tk = double(s.T) * double(s.K);
    return {0, s.ste ? 8 * te : 4 * te + 8 * tk, "f32", 4 * te};
  }

  static Tolerance tolerance(const Shape&, Fill, const std::string&) { return {}; }

  static std::vector<Case<Shape>> cases() {
    std::vector<Case<Shape>> c;
    c.push_back({{.T = 4096, .E = 256, .K = 8}, Size::quick});
    c.push_back({{.T = 4096, .E = 256, .K = 8, .ste = true}, Size::standard});
    c.push_back({{.T = 4096, .E = 64, .K = 6}, Size::standard});
    c.push_back({{.T = 16384, .E = 256, .K = 8}, Size::full});
    c.push_back({{.T = 7, .E = 13, .K = 3}, Size::quick, true});
    c.push_back({{.T = 3, .E = 5, .K = 5}, Size::quick, true});
    c.push_back({{.T = 7, .E = 13, .K = 3, .ste = true}, Size::quick, true});
    return c;
  }

  static std::vector<Impl<TopkBackward>> impls() {
    std::vector<Impl<TopkBackward>> v;
    v.push_back(
        {"cpu_simd", nullptr, [](Data& d) {
           const Shape& s = d.shape;
           const spec::TopkBackwardArgs a{
               s.T, s.E, s.K, s.ste, d.idx.as<int32_t>(), d.dy.as<float>(), d.ds.as<float>()};
           return Runner{.run = [a] { kern::topk_backward_cpu_simd(a); },
                         .resolved_isa = "baseline"};
         }});
    v.push_back(cuda_impl<TopkBackward>("cuda_simt", nullptr, [](Data& d, CudaMirror& m) {
      const Shape& s = d.shape;
      spec::TopkBackwardArgs a{
          s.T, s.E, s.K, s.ste, d.idx.as<int32_t>(), d.dy.as<float>(), d.ds.as<float>()};
      m.map(a.idx, a.dy, a.ds);
      return [a](kern::CudaStream stream) { kern::topk_backward_cuda_simt(a, stream); };
    }));
    v.push_back({"cpu_eigen", nullptr,
                 [](Data& d) {
                   return Runner{.run =
                                     [&d] {
                                       const Shape& s = d.shape;
                                       ref::topk_backward<float>(s.T, s.E, s.K, d.idx.as<int32_t>(),
                                                                 d.dy.as<float>(), d.ds.as<float>(),
                                                                 s.ste);
                                     },
                                 .resolved_isa = "baseline"};
                 },
                 true});
    return v;
  }
};

}  // namespace

std::unique_ptr<OpBase> make_topk_backward_op() { return make_op<TopkBackward>(); }

}  // namespace v3b::bench
