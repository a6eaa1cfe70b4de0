// SwiGLU activation: everything the suite knows about this op.
#include "kernels/norm_rope/swiglu.h"

#include <vector>

#include "bench/harness/cuda_mirror.h"
#include "bench/harness/op.h"
#include "bench/ops/quantised.h"
#include "bench/ops/registry.h"
#include "kernels/gemm/fp8.h"
#include "kernels/norm_rope/norm_rope_cuda.h"
#include "reference/swiglu.h"

namespace v3b::bench {
namespace {

struct Swiglu {
  static constexpr const char* name = "swiglu";
  using Shape = spec::SwigluShape;
  struct Data {
    Shape shape;
    HostTensor gate_up, y;     // [T, 2m]: gate | up, as the fused product leaves it
    HostTensor codes, scales;  // quant: instead of y
    std::vector<HostTensor*> tensors() {
      if (shape.quant) return {&gate_up, &codes, &scales};
      return {&gate_up, &y};
    }
    kern::QuantOut quant_out() {
      return {codes.as<spec::f8e4m3>(), scales.as<float>(), shape.act_scale};
    }
    spec::SwigluArgs args() {
      const char* base = static_cast<const char*>(gate_up.data());
      return {shape.T,     shape.m, shape.dtype,
              shape.dtype, base,    base + shape.m * spec::dtype_bytes(shape.dtype),
              2 * shape.m, nullptr, shape.quant ? nullptr : y.data(),
              shape.m};
    }
  };
  static void validate(const Shape& s) {
    if (s.quant && s.dtype != spec::DType::bf16)
      throw Error(ExitCode::usage, "quantised rows are of bf16", "--case of swiglu",
                  "dtype=bf16 beside quant=1", spec::dtype_name(s.dtype));
  }
  static std::unique_ptr<Data> make(const Shape& s, Fill, uint64_t seed) {
    auto d = std::make_unique<Data>();
    d->shape = s;
    d->gate_up = HostTensor("gate_up", Role::input, s.dtype, {s.T, 2 * s.m});
    if (s.quant) {
      d->codes = HostTensor("codes", Role::output, spec::DType::f8e4m3, {s.T, s.m});
      d->scales =
          HostTensor("scales", Role::output, spec::DType::f32, {s.T, spec::fp8_blocks(s.m)});
    } else {
      d->y = HostTensor("y", Role::output, s.dtype, {s.T, s.m});
    }
    d->gate_up.fill_real(seed, 2.0);
    return d;
  }
  static void split(const Data& d, auto& gate, auto& up) {
    const Shape& s = d.shape;
    for (int64_t t = 0; t < s.T; ++t) {
      for (int64_t i = 0; i < s.m; ++i) {
        gate[size_t(t * s.m + i)] = d.gate_up.get(t * 2 * s.m + i);
        up[size_t(t * s.m + i)] = d.gate_up.get(t * 2 * s.m + s.m + i);
      }
    }
  }
  static Expected reference(const Data& d) {
    const Shape& s = d.shape;
    std::vector<double> gate(size_t(s.T * s.m)), up(gate.size()), y(gate.size());
    split(d, gate, up);
    ref::swiglu<double>(s.T, s.m, gate.data(), up.data(), y.data());
    Expected e;
    if (s.quant)
      expect_quantised(s.T, s.m, std::move(y), s.act_scale, e);
    else
      e.tensors.push_back({.name = "y", .values = std::move(y)});
    return e;
  }
  static Cost cost(const Shape& s) {
    const double n = double(s.T) * double(s.m);
    const double e = double(spec::dtype_bytes(s.dtype));
    const double out = s.quant ? n + 4.0 * double(s.T * spec::fp8_blocks(s.m)) : n * e;
    return {(s.quant ? 8 : 5) * n, 2 * n * e + out, "f32", out};
  }
  static Tolerance tolerance(const Shape& s, Fill, const std::string& output) {
    // y before its rounding: 7e-5 (a reciprocal of 14 bits) beside a bf16 interval of 4e-3.
    if (s.quant) return quantised_tolerance(output, 4e-2);
    // f32: exp within 1 ulp, of an argument that is itself exact; bf16: one rounding.
    if (s.dtype == spec::DType::f32) return {.rel_fro = 1e-6, .abs_rms = 1e-7, .rel = 2e-6};
    return {.rel_fro = 3e-3, .abs_rms = 1e-7, .rel = 0.0040};
  }
  static std::vector<Case<Shape>> cases() {
    using enum spec::DType;
    std::vector<Case<Shape>> c;
    c.push_back({{.T = 512, .m = 2048, .dtype = bf16}, Size::quick});
    c.push_back({{.T = 512, .m = 18432, .dtype = bf16}, Size::standard});
    c.push_back({{.T = 512, .m = 2048, .quant = true, .dtype = bf16}, Size::quick});
    c.push_back({{.T = 512, .m = 18432, .quant = true, .dtype = bf16}, Size::standard});
    c.push_back({{.T = 8, .m = 2048, .dtype = bf16}, Size::standard});
    c.push_back({{.T = 512, .m = 1408, .dtype = bf16}, Size::full});
    c.push_back({{.T = 512, .m = 2048, .dtype = f32}, Size::full});
    c.push_back({{.T = 4096, .m = 2048, .dtype = bf16}, Size::full});
    c.push_back({{.T = 5, .m = 37, .dtype = f32}, Size::quick, true});
    c.push_back({{.T = 3, .m = 130, .dtype = bf16}, Size::quick, true});
    c.push_back({{.T = 3, .m = 1500, .quant = true, .dtype = bf16}, Size::quick, true});
    c.push_back(
        {{.T = 2, .m = 200, .quant = true, .act_scale = spec::ActScale::ue8m0, .dtype = bf16},
         Size::quick,
         true});
    return c;
  }
  static std::vector<Impl<Swiglu>> impls() {
    std::vector<Impl<Swiglu>> v;
    v.push_back({"cpu_simd",
                 nullptr,
                 [](Data& d) {
                   const spec::SwigluArgs a = d.args();
                   if (d.shape.quant)
                     return Runner{
                         .run = [a, q = d.quant_out()] { kern::swiglu_quant_cpu_simd(a, q); },
                         .resolved_isa = kern::fp8_quant_cpu_simd_isa(d.shape.dtype)};
                   return Runner{.run = [a] { kern::swiglu_cpu_simd(a); },
                                 .resolved_isa = kern::swiglu_cpu_simd_isa()};
                 },
                 false,
                 {kern::Isa::avx2, kern::Isa::avx512, kern::Isa::avx512_bf16}});
    v.push_back(cuda_impl<Swiglu>("cuda_simt", nullptr, [](Data& d, CudaMirror& m) {
      auto a = d.args();
      auto q = d.quant_out();
      m.map(a.gate, a.up, a.y, q.codes, q.scales);
      return [a, q](kern::CudaStream stream) {
        if (q.codes != nullptr) return kern::swiglu_quant_cuda_simt(a, q, stream);
        kern::swiglu_cuda_simt(a, stream);
      };
    }));
    v.push_back({"cpu_eigen", nullptr,
                 [](Data& d) {
                   const size_t n = size_t(d.shape.T * d.shape.m);
                   auto gate = std::make_shared<std::vector<float>>(n);
                   auto up = std::make_shared<std::vector<float>>(n);
                   return Runner{
                       .run =
                           [&d, gate, up] {
                             const Shape& s = d.shape;
                             split(d, *gate, *up);
                             ref::swiglu<float>(s.T, s.m, gate->data(), up->data(), gate->data());
                             if (s.quant)
                               quantise_rounded(s.T, s.m, *gate, s.act_scale,
                                                d.codes.as<spec::f8e4m3>(), d.scales.as<float>());
                             for (int64_t i = 0; !s.quant && i < d.y.numel(); ++i)
                               d.y.set(i, (*gate)[size_t(i)]);
                           },
                       .resolved_isa = "baseline"};
                 },
                 true});
    return v;
  }
};

}  // namespace

std::unique_ptr<OpBase> make_swiglu_op() { return make_op<Swiglu>(); }

}  // namespace v3b::bench
