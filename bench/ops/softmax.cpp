// Softmax rows with log-sum-exp: everything the suite knows about this op.
#include "reference/softmax.h"

#include <vector>

#include "bench/harness/cuda_mirror.h"
#include "bench/harness/op.h"
#include "bench/ops/registry.h"
#include "kernels/gemm/gemm.h"
#include "kernels/norm_rope/norm_rope_cuda.h"
#include "kernels/norm_rope/swiglu.h"

namespace v3b::bench {
namespace {

constexpr double kScale = 0.5;

struct Softmax {
  static constexpr const char* name = "softmax";
  using Shape = spec::SoftmaxShape;
  struct Data {
    Shape shape;
    HostTensor x, y, lse;
    std::vector<HostTensor*> tensors() { return {&x, &y, &lse}; }
  };
  static void validate(const Shape& s) {
    if (s.dtype != spec::DType::f32)
      throw Error(ExitCode::usage, "softmax has no such dtype", "--case of softmax", "f32",
                  spec::dtype_name(s.dtype));
  }
  static std::unique_ptr<Data> make(const Shape& s, Fill, uint64_t seed) {
    auto d = std::make_unique<Data>();
    d->shape = s;
    d->x = HostTensor("x", Role::input, s.dtype, {s.T, s.n});
    d->y = HostTensor("y", Role::output, s.dtype, {s.T, s.n});
    d->lse = HostTensor("lse", Role::output, s.dtype, {s.T});
    d->x.fill_real(seed, 2.0);
    return d;
  }
  static Expected reference(const Data& d) {
    const Shape& s = d.shape;
    const std::vector<double> x = d.x.to_doubles();
    std::vector<double> y(x.size()), lse(size_t(s.T));
    ref::softmax<double>(s.T, s.n, kScale, x.data(), y.data(), lse.data());
    Expected e;
    e.tensors.push_back({.name = "y", .values = std::move(y)});
    e.tensors.push_back({.name = "lse", .values = std::move(lse)});
    return e;
  }
  static Cost cost(const Shape& s) {
    const double n = double(s.T) * double(s.n);
    return {5 * n, 8 * n, "f32", 4 * n};
  }
  static Tolerance tolerance(const Shape&, Fill, const std::string& output) {
    if (output == "lse") return {.rel_fro = 1e-6, .rel = 1e-6, .abs = 2e-6};
    // exp(z - max): z - max is rounded, half an ulp below 32 is 2^-20 = 9.5e-7, and exp makes a
    // relative error of it; exp itself (2 ulp), the sum and the division add 5e-7. Beyond e^-27.6
    // `abs` judges. The norm is that of the largest elements, whose argument is near 0.
    return {.rel_fro = 5e-7, .rel = 2e-6, .abs = 1e-12};
  }
  static std::vector<Case<Shape>> cases() {
    std::vector<Case<Shape>> c;
    c.push_back({{.T = 64, .n = 129280}, Size::quick});
    c.push_back({{.T = 1, .n = 129280}, Size::standard});
    c.push_back({{.T = 4096, .n = 256}, Size::standard});
    c.push_back({{.T = 2048, .n = 4096}, Size::full});
    c.push_back({{.T = 256, .n = 32768}, Size::full});
    c.push_back({{.T = 3, .n = 2085}, Size::quick, true});
    c.push_back({{.T = 1, .n = 40001}, Size::quick, true});
    c.push_back({{.T = 5, .n = 37}, Size::quick, true});
    c.push_back({{.T = 3, .n = 1}, Size::quick, true});
    return c;
  }
  static std::vector<Impl<Softmax>> impls() {
    std::vector<Impl<Softmax>> v;
    v.push_back(
        {"cpu_simd",
         nullptr,
         [](Data& d) {
           const Shape& s = d.shape;
           const spec::SoftmaxArgs a{
               s.T, s.n, kScale, d.x.as<float>(), s.n, d.y.as<float>(), s.n, d.lse.as<float>()};
           return Runner{.run = [a] { kern::softmax_cpu_simd(a); },
                         .resolved_isa = kern::softmax_cpu_simd_isa()};
         },
         false,
         {kern::Isa::avx2, kern::Isa::avx512}});
    v.push_back(cuda_impl<Softmax>("cuda_simt", nullptr, [](Data& d, CudaMirror& m) {
      const Shape& s = d.shape;
      spec::SoftmaxArgs a{
          s.T, s.n, kScale, d.x.as<float>(), s.n, d.y.as<float>(), s.n, d.lse.as<float>()};
      m.map(a.x, a.y, a.lse);
      void* scratch = m.scratch(kern::softmax_cuda_scratch_bytes(a));
      return [=](kern::CudaStream stream) { kern::softmax_cuda_simt(a, scratch, stream); };
    }));
    v.push_back({"cpu_onednn", nullptr,
                 [](Data& d) {
                   const Shape& s = d.shape;
                   return Runner{
                       .run = kern::softmax_cpu_onednn({s.T, s.n, kScale, d.x.as<float>(), s.n,
                                                        d.y.as<float>(), s.n, d.lse.as<float>()}),
                       .resolved_isa = kern::gemm_onednn_isa()};
                 },
                 true});
    // oneDNN sums a row in sequence, 16 sums side by side: n / 16 roundings each, four deviations of their walk. The whole
    // row is off by it.
    v.back().tolerance = [](const Shape& s, Fill fill, const std::string& output) {
      Tolerance t = tolerance(s, fill, output);
      const double walk = 4 * std::sqrt(static_cast<double>(s.n) / 16) * 0x1p-24;
      t.rel_fro += walk, t.rel += walk;
      return t;
    };
    v.push_back({"cpu_eigen", nullptr,
                 [](Data& d) {
                   return Runner{.run =
                                     [&d] {
                                       ref::softmax<float>(d.shape.T, d.shape.n, float(kScale),
                                                           d.x.as<float>(), d.y.as<float>(),
                                                           d.lse.as<float>());
                                     },
                                 .resolved_isa = "baseline"};
                 },
                 true});
    return v;
  }
};

}  // namespace

std::unique_ptr<OpBase> make_softmax_op() { return make_op<Softmax>(); }

}  // namespace v3b::bench
