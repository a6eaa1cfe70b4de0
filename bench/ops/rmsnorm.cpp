// RMSNorm: everything the suite knows about this op.
#include "kernels/norm_rope/rmsnorm.h"

#include <cstring>
#include <vector>

#include "bench/harness/cuda_mirror.h"
#include "bench/harness/op.h"
#include "bench/ops/quantised.h"
#include "bench/ops/registry.h"
#include "kernels/gemm/fp8.h"
#include "kernels/norm_rope/norm_rope_cuda.h"
#include "reference/rmsnorm.h"

namespace v3b::bench {
namespace {

constexpr double kEps = 1e-6;

struct RmsNorm {
  static constexpr const char* name = "rmsnorm";
  using Shape = spec::RmsNormShape;

  struct Data {
    Shape shape;
    HostTensor x, r_in, r, w, y;  // r_in keeps the residual that r (in and out) starts from
    HostTensor codes, scales;     // quant: instead of y
    std::vector<HostTensor*> tensors() {
      std::vector<HostTensor*> all = {&x, &w};
      if (shape.residual) all.insert(all.end(), {&r_in, &r});
      if (shape.quant)
        all.insert(all.end(), {&codes, &scales});
      else
        all.push_back(&y);
      return all;
    }
    kern::QuantOut quant_out() {
      return {codes.as<spec::f8e4m3>(), scales.as<float>(), shape.act_scale};
    }
    const void* residual_in() const { return shape.residual ? r_in.data() : nullptr; }
    spec::RmsNormArgs args() {
      return {shape.T,
              shape.d,
              kEps,
              shape.norm_rounding,
              shape.dtype,
              x.data(),
              shape.residual ? r.data() : nullptr,
              w.data(),
              shape.quant ? nullptr : y.data()};
    }
  };

  static void validate(const Shape& s) {
    if (s.quant && s.dtype != spec::DType::bf16)
      throw Error(ExitCode::usage, "quantised rows are of bf16", "--case of rmsnorm",
                  "dtype=bf16 beside quant=1", spec::dtype_name(s.dtype));
  }
  static std::unique_ptr<Data> make(const Shape& s, Fill, uint64_t seed) {
    auto d = std::make_unique<Data>();
    d->shape = s;
    d->x = HostTensor("x", Role::input, s.dtype, {s.T, s.d});
    d->w = HostTensor("w", Role::input, s.dtype, {s.d});
    if (s.quant) {
      d->codes = HostTensor("codes", Role::output, spec::DType::f8e4m3, {s.T, s.d});
      d->scales =
          HostTensor("scales", Role::output, spec::DType::f32, {s.T, spec::fp8_blocks(s.d)});
    } else {
      d->y = HostTensor("y", Role::output, s.dtype, {s.T, s.d});
    }
    d->x.fill_real(seed);
    d->w.fill_real(seed + 1, 0.1, false);
    for (int64_t i = 0; i < s.d; ++i) d->w.set(i, 1.0 + d->w.get(i));
    if (s.residual) {
      d->r_in = HostTensor("r_in", Role::input, s.dtype, {s.T, s.d});
      d->r = HostTensor("r", Role::output, s.dtype, {s.T, s.d});
      d->r_in.fill_real(seed + 2);
    }
    return d;
  }

  // The residual is in and out: a run starts from r_in. cpu_simd reads it there, as a caller with two buffers would; who
  // has no such form copies first, and the copy is part of the timed work. cost() counts reading r_in and writing r once.
  static void restore(Data& d) {
    if (d.shape.residual) std::memcpy(d.r.data(), d.r_in.data(), static_cast<size_t>(d.r.bytes()));
  }

  static Expected reference(const Data& d) {
    const Shape& s = d.shape;
    std::vector<double> x = d.x.to_doubles(), w = d.w.to_doubles(), y(x.size());
    Expected e;
    if (s.residual) {
      const std::vector<double> r = d.r_in.to_doubles();
      for (size_t i = 0; i < x.size(); ++i) x[i] = ref::round_to(x[i] + r[i], s.dtype);
    }
    ref::rmsnorm<double>(s.T, s.d, kEps, x.data(), w.data(), y.data(), s.norm_rounding, s.dtype);
    if (s.quant)
      expect_quantised(s.T, s.d, std::move(y), s.act_scale, e);
    else
      e.tensors.push_back({.name = "y", .values = std::move(y)});
    if (s.residual) e.tensors.push_back({.name = "r", .values = std::move(x)});
    return e;
  }

  static Cost cost(const Shape& s) {
    const double e = static_cast<double>(spec::dtype_bytes(s.dtype)), n = double(s.T) * double(s.d);
    // residual: x and r_in are read, r and y written; r may stay in a cache between its two writes
    const double out = s.quant ? n + 4.0 * double(s.T * spec::fp8_blocks(s.d)) : n * e;
    const double written = out + (s.residual ? n * e : 0);
    return {(s.quant ? 7 : 4) * n, (s.residual ? 2 : 1) * n * e + written, "f32", written};
  }

  static Tolerance tolerance(const Shape& s, Fill, const std::string& output) {
    if (output == "r") return {};  // one rounding of an exactly representable sum: bitwise
    // y before its rounding is within a few 1e-6; a bf16 interval is 4e-3 of its values. hf rounds twice.
    if (s.quant)
      return quantised_tolerance(output, s.norm_rounding == spec::NormRounding::hf ? 8e-3 : 4e-3);
    if (s.dtype == spec::DType::f32) return {.rel_fro = 1e-6, .abs_rms = 1e-6, .rel = 2e-6};
    const double hf = s.norm_rounding == spec::NormRounding::hf ? 2.0 : 1.0;  // second rounding
    return {.rel_fro = 3e-3 * hf, .abs_rms = 1e-6, .rel = 0.0040 * hf};  // half a bf16 ulp is 2^-8
  }

  static std::vector<Case<Shape>> cases() {
    using enum spec::DType;
    std::vector<Case<Shape>> c;
    c.push_back({{.T = 512, .d = 7168, .dtype = bf16}, Size::quick});
    c.push_back({{.T = 512, .d = 7168, .residual = true, .dtype = bf16}, Size::quick});
    c.push_back({{.T = 512, .d = 7168, .quant = true, .dtype = bf16}, Size::quick});
    c.push_back(
        {{.T = 512, .d = 7168, .residual = true, .quant = true, .dtype = bf16}, Size::standard});
    c.push_back({{.T = 1, .d = 7168, .dtype = bf16}, Size::standard});
    c.push_back({{.T = 512, .d = 2048, .dtype = bf16}, Size::standard});
    c.push_back({{.T = 512, .d = 1536, .dtype = bf16}, Size::full});
    c.push_back({{.T = 512, .d = 7168, .dtype = f32}, Size::full});
    c.push_back({{.T = 4096, .d = 7168, .dtype = bf16}, Size::full});
    c.push_back({{.T = 4096, .d = 7168, .residual = true, .dtype = bf16}, Size::full});
    c.push_back({{.T = 3, .d = 37, .dtype = f32}, Size::quick, true});
    c.push_back({{.T = 5, .d = 130, .residual = true, .dtype = bf16}, Size::quick, true});
    c.push_back({{.T = 4, .d = 512, .norm_rounding = spec::NormRounding::hf, .dtype = bf16},
                 Size::quick,
                 true});
    for (const bool residual : {false, true})
      c.push_back({{.T = 3,
                    .d = 1500,
                    .residual = residual,
                    .quant = true,
                    .act_scale = residual ? spec::ActScale::ue8m0 : spec::ActScale::fp32,
                    .dtype = bf16},
                   Size::quick,
                   true});
    return c;
  }

  static std::vector<Impl<RmsNorm>> impls() {
    std::vector<Impl<RmsNorm>> v;
    v.push_back({"cpu_simd",
                 nullptr,
                 [](Data& d) {
                   if (d.shape.quant)
                     return Runner{.run =
                                       [&d] {
                                         kern::rmsnorm_quant_cpu_simd(d.args(), d.residual_in(),
                                                                      d.quant_out());
                                       },
                                   .resolved_isa = kern::fp8_quant_cpu_simd_isa(d.shape.dtype)};
                   return Runner{.run = [&d] { kern::rmsnorm_cpu_simd(d.args(), d.residual_in()); },
                                 .resolved_isa = kern::rmsnorm_cpu_simd_isa()};
                 },
                 false,
                 {kern::Isa::avx2, kern::Isa::avx512, kern::Isa::avx512_bf16}});
    v.push_back(cuda_impl<RmsNorm>("cuda_simt", nullptr, [](Data& d, CudaMirror& m) {
      auto a = d.args();
      const void* from = d.shape.residual ? d.r_in.data() : nullptr;
      m.map(a.x, a.residual, a.w, a.y, from);
      const int64_t bytes = d.shape.residual ? d.r.bytes() : 0;
      auto q = d.quant_out();
      m.map(q.codes, q.scales);
      return [=](kern::CudaStream s) {
        if (from != nullptr) kern::cuda_copy(a.residual, from, bytes, s);
        if (q.codes != nullptr) return kern::rmsnorm_quant_cuda_simt(a, q, s);
        kern::rmsnorm_cuda_simt(a, s);
      };
    }));
    v.push_back({"cpu_eigen", nullptr,
                 [](Data& d) {
                   auto x = std::make_shared<std::vector<float>>(d.x.numel());
                   auto w = std::make_shared<std::vector<float>>(d.w.numel());
                   for (int64_t i = 0; i < d.w.numel(); ++i) (*w)[i] = float(d.w.get(i));
                   auto y = std::make_shared<std::vector<float>>(d.x.numel());
                   return Runner{
                       .run =
                           [&d, x, w, y] {
                             const Shape& s = d.shape;
                             restore(d);
                             for (int64_t i = 0; i < d.x.numel(); ++i) {
                               (*x)[i] = float(d.x.get(i));
                               if (s.residual) {
                                 (*x)[i] = ref::round_to((*x)[i] + float(d.r.get(i)), s.dtype);
                                 d.r.set(i, (*x)[i]);
                               }
                             }
                             ref::rmsnorm<float>(s.T, s.d, float(kEps), x->data(), w->data(),
                                                 y->data(), s.norm_rounding, s.dtype);
                             if (s.quant)
                               quantise_rounded(s.T, s.d, *y, s.act_scale,
                                                d.codes.as<spec::f8e4m3>(), d.scales.as<float>());
                             else
                               for (int64_t i = 0; i < d.y.numel(); ++i) d.y.set(i, (*y)[i]);
                           },
                       .resolved_isa = "baseline"};
                 },
                 true});
    return v;
  }
};

}  // namespace

std::unique_ptr<OpBase> make_rmsnorm_op() { return make_op<RmsNorm>(); }

}  // namespace v3b::bench
