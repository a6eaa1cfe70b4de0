// FP8 quantisation: everything the suite knows about this op. Codes and scales are compared
// exactly.
#include "reference/fp8_quant.h"

#include <vector>

#include "bench/harness/cuda_mirror.h"
#include "bench/harness/op.h"
#include "bench/ops/registry.h"
#include "kernels/gemm/fp8.h"
#include "kernels/gemm/rows_cuda.h"

namespace v3b::bench {
namespace {

using spec::DType;

struct Fp8Quant {
  static constexpr const char* name = "fp8_quant";
  using Shape = spec::Fp8QuantShape;

  struct Data {
    Shape shape;
    HostTensor x, codes, scales;
    std::vector<HostTensor*> tensors() { return {&x, &codes, &scales}; }
    spec::Fp8QuantArgs args() {
      return {shape.rows,
              shape.cols,
              shape.weight,
              shape.act_scale,
              shape.dtype,
              x.data(),
              codes.as<spec::f8e4m3>(),
              scales.as<float>()};
    }
  };

  static std::unique_ptr<Data> make(const Shape& s, Fill, uint64_t seed) {
    auto d = std::make_unique<Data>();
    d->shape = s;
    d->x = HostTensor("x", Role::input, s.dtype, {s.rows, s.cols});
    d->codes = HostTensor("codes", Role::output, DType::f8e4m3, {s.rows, s.cols});
    d->scales =
        HostTensor("scales", Role::output, DType::f32,
                   {s.weight ? spec::fp8_blocks(s.rows) : s.rows, spec::fp8_blocks(s.cols)});
    d->x.fill_real(seed);
    return d;
  }

  template <class S>
  static void run_reference(const Shape& s, const S* x, spec::f8e4m3* codes, float* scales) {
    if (s.weight) {
      ref::fp8_quantize_weight<S>(s.rows, s.cols, x, codes, scales);
    } else {
      ref::fp8_quantize_act<S>(s.rows, s.cols, x, codes, scales, s.act_scale);
    }
  }

  static Expected reference(const Data& d) {
    const std::vector<double> x = d.x.to_doubles();
    std::vector<spec::f8e4m3> codes(x.size());
    std::vector<float> scales(size_t(d.scales.numel()));
    run_reference(d.shape, x.data(), codes.data(), scales.data());
    ExpectedTensor c{.name = "codes"}, s{.name = "scales"};
    c.values.reserve(codes.size());
    for (const auto q : codes) c.values.push_back(spec::to_float(q));
    s.values.assign(scales.begin(), scales.end());
    Expected e;
    e.tensors.push_back(std::move(c));
    e.tensors.push_back(std::move(s));
    return e;
  }

  static Cost cost(const Shape& s) {
    const double n = double(s.rows) * double(s.cols);
    const double scales =
        double(s.weight ? spec::fp8_blocks(s.rows) : s.rows) * double(spec::fp8_blocks(s.cols));
    return {3 * n, n * double(spec::dtype_bytes(s.dtype) + 1) + 4 * scales, "f32", n + 4 * scales};
  }

  // The same division and the same rounding: bitwise.
  static Tolerance tolerance(const Shape&, Fill, const std::string&) { return {}; }

  static std::vector<Case<Shape>> cases() {
    using enum spec::DType;
    using spec::ActScale;
    std::vector<Case<Shape>> c;
    c.push_back({{.rows = 512, .cols = 7168}, Size::quick});
    c.push_back({{.rows = 2048, .cols = 7168, .weight = true}, Size::quick});
    c.push_back({{.rows = 512, .cols = 7168, .act_scale = ActScale::ue8m0}, Size::standard});
    c.push_back({{.rows = 1, .cols = 7168}, Size::standard, false, CacheState::hot});
    c.push_back({{.rows = 128, .cols = 2048}, Size::standard});
    c.push_back({{.rows = 576, .cols = 7168, .weight = true}, Size::standard});
    c.push_back({{.rows = 4096, .cols = 7168}, Size::full});
    c.push_back({{.rows = 512, .cols = 7168, .dtype = f32}, Size::full});
    c.push_back({{.rows = 7168, .cols = 2048, .weight = true}, Size::full});
    for (const bool weight : {false, true})
      for (const DType t : {bf16, f32})
        for (const auto& s : {std::array<int64_t, 2>{1, 128}, {3, 77}, {200, 300}})
          c.push_back(
              {{.rows = s[0], .cols = s[1], .weight = weight, .dtype = t}, Size::quick, true});
    c.push_back(
        {{.rows = 5, .cols = 200, .act_scale = ActScale::ue8m0, .dtype = f32}, Size::quick, true});
    return c;
  }

  static std::vector<Impl<Fp8Quant>> impls() {
    std::vector<Impl<Fp8Quant>> v;
    v.push_back({"cpu_simd",
                 nullptr,
                 [](Data& d) {
                   return Runner{.run = [a = d.args()] { kern::fp8_quant_cpu_simd(a); },
                                 .resolved_isa = kern::fp8_quant_cpu_simd_isa(d.shape.dtype)};
                 },
                 false,
                 {kern::Isa::avx2, kern::Isa::avx512, kern::Isa::avx512_bf16}});
    v.push_back(cuda_impl<Fp8Quant>("cuda_simt", nullptr, [](Data& d, CudaMirror& m) {
      auto a = d.args();
      m.map(a.x, a.codes, a.scales);
      return [a](kern::CudaStream stream) { kern::fp8_quant_cuda_simt(a, stream); };
    }));
    v.push_back({"cpu_eigen", nullptr,
                 [](Data& d) {
                   auto x = std::make_shared<std::vector<float>>(d.x.numel());
                   return Runner{.run =
                                     [&d, x] {
                                       for (int64_t i = 0; i < d.x.numel(); ++i)
                                         (*x)[size_t(i)] = float(d.x.get(i));
                                       run_reference(d.shape, x->data(), d.codes.as<spec::f8e4m3>(),
                                                     d.scales.as<float>());
                                     },
                                 .resolved_isa = "baseline"};
                 },
                 true});
    return v;
  }
};

}  // namespace

std::unique_ptr<OpBase> make_fp8_quant_op() { return make_op<Fp8Quant>(); }

}  // namespace v3b::bench
