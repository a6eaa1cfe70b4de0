// RoPE from given tables: everything the suite knows about this op.
#include "kernels/norm_rope/rope.h"

#include <cmath>
#include <vector>

#include "bench/harness/cuda_mirror.h"
#include "bench/harness/op.h"
#include "bench/ops/registry.h"
#include "kernels/norm_rope/norm_rope_cuda.h"
#include "reference/rope.h"

namespace v3b::bench {
namespace {

constexpr int64_t kFirst = 1000;  // position of the table's first row: no row is the identity

struct Rope {
  static constexpr const char* name = "rope";
  using Shape = spec::RopeShape;
  struct Data {
    Shape shape;
    HostTensor x, cos, sin, positions, y;
    std::vector<HostTensor*> tensors() { return {&x, &cos, &sin, &positions, &y}; }
    spec::RopeForm form() const { return spec::rope_form(shape.rope_layout, true); }
    spec::RopeArgs args() {
      const Shape& s = shape;
      return {s.T,           s.n_h,           s.d_r,           form(),
              false,         s.dtype,         s.dtype,         x.data(),
              s.n_h * s.d_r, s.d_r,           y.data(),        s.n_h * s.d_r,
              s.d_r,         cos.as<float>(), sin.as<float>(), positions.as<int32_t>()};
    }
  };

  // Table rows are those of V3's YaRN-free frequencies at positions 1000..1000+T-1; tokens use them
  // in reversed order, so that a kernel that ignores `positions` fails.
  static void validate(const Shape& s) {
    if (s.d_r % 2 != 0)
      throw Error(ExitCode::usage, "rotated size is odd", "--case of rope", "an even d_r",
                  std::to_string(s.d_r));
  }

  static std::unique_ptr<Data> make(const Shape& s, Fill, uint64_t seed) {
    auto d = std::make_unique<Data>();
    d->shape = s;
    const int64_t half = s.d_r / 2;
    d->x = HostTensor("x", Role::input, s.dtype, {s.T, s.n_h, s.d_r});
    d->cos = HostTensor("cos", Role::input, spec::DType::f32, {s.T, half});
    d->sin = HostTensor("sin", Role::input, spec::DType::f32, {s.T, half});
    d->positions = HostTensor("positions", Role::input, spec::DType::i32, {s.T});
    d->y = HostTensor("y", Role::output, s.dtype, {s.T, s.n_h, s.d_r});
    d->x.fill_real(seed);
    for (int64_t p = 0; p < s.T; ++p) {
      for (int64_t i = 0; i < half; ++i) {
        const double angle =
            double(kFirst + p) * std::pow(10000.0, -2.0 * double(i) / double(s.d_r));
        d->cos.set(p * half + i, std::cos(angle));
        d->sin.set(p * half + i, std::sin(angle));
      }
      d->positions.set(p, double(s.T - 1 - p));
    }
    return d;
  }

  static Expected reference(const Data& d) {
    const Shape& s = d.shape;
    const int64_t half = s.d_r / 2;
    const std::vector<double> x = d.x.to_doubles();
    std::vector<double> c(size_t(s.T * half)), sn(c.size()), y(x.size());
    for (int64_t t = 0; t < s.T; ++t) {
      const int64_t p = int64_t(d.positions.get(t));
      for (int64_t i = 0; i < half; ++i) {
        c[size_t(t * half + i)] = d.cos.get(p * half + i);
        sn[size_t(t * half + i)] = d.sin.get(p * half + i);
      }
    }
    ref::rope<double>(s.T, s.n_h, s.d_r, d.form(), false, x.data(), c.data(), sn.data(), y.data());
    Expected e;
    e.tensors.push_back({.name = "y", .values = std::move(y)});
    return e;
  }

  static Cost cost(const Shape& s) {
    const double n = double(s.T) * double(s.n_h) * double(s.d_r);
    return {3 * n, 2 * n * double(spec::dtype_bytes(s.dtype)) + 4.0 * double(s.T) * double(s.d_r),
            "f32", n * double(spec::dtype_bytes(s.dtype))};
  }
  static Tolerance tolerance(const Shape& s, Fill, const std::string&) {
    if (s.dtype == spec::DType::f32) return {.rel_fro = 1e-6, .abs_rms = 1e-6, .rel = 1e-6};
    return {.rel_fro = 3e-3, .abs_rms = 1e-6, .rel = 0.0040};
  }
  static std::vector<Case<Shape>> cases() {
    using enum spec::DType;
    using spec::RopeLayout;
    std::vector<Case<Shape>> c;
    c.push_back({{.T = 512, .n_h = 128, .d_r = 64, .dtype = bf16}, Size::quick});
    c.push_back({{.T = 1, .n_h = 129, .d_r = 64, .dtype = bf16}, Size::standard});
    c.push_back({{.T = 512, .n_h = 16, .d_r = 64, .dtype = bf16}, Size::standard});
    c.push_back(
        {{.T = 512, .n_h = 128, .d_r = 64, .rope_layout = RopeLayout::hf_halfsplit, .dtype = bf16},
         Size::full});
    c.push_back({{.T = 512, .n_h = 128, .d_r = 64, .dtype = f32}, Size::full});
    c.push_back({{.T = 4096, .n_h = 128, .d_r = 64, .dtype = bf16}, Size::full});
    c.push_back({{.T = 3, .n_h = 5, .d_r = 64, .dtype = bf16}, Size::quick, true});
    c.push_back(
        {{.T = 3, .n_h = 5, .d_r = 64, .rope_layout = RopeLayout::hf_halfsplit, .dtype = bf16},
         Size::quick,
         true});
    c.push_back({{.T = 3, .n_h = 5, .d_r = 64, .dtype = f32}, Size::quick, true});
    c.push_back({{.T = 7, .n_h = 3, .d_r = 6, .dtype = f32}, Size::quick, true});
    c.push_back(
        {{.T = 9, .n_h = 5, .d_r = 24, .rope_layout = RopeLayout::hf_halfsplit, .dtype = f32},
         Size::quick,
         true});
    return c;
  }
  static std::vector<Impl<Rope>> impls() {
    std::vector<Impl<Rope>> v;
    v.push_back({"cpu_simd",
                 nullptr,
                 [](Data& d) {
                   const spec::RopeArgs a = d.args();
                   return Runner{.run = [a] { kern::rope_cpu_simd(a); },
                                 .resolved_isa = kern::rope_cpu_simd_isa()};
                 },
                 false,
                 {kern::Isa::avx2, kern::Isa::avx512, kern::Isa::avx512_bf16}});
    v.push_back(cuda_impl<Rope>(
        "cuda_simt",
        [](const Shape& s) {
          return s.d_r <= 512 ? Support{}
                              : Support{Support::State::unsupported, "d_r is larger than 512"};
        },
        [](Data& d, CudaMirror& m) {
          auto a = d.args();
          m.map(a.x, a.y, a.cos, a.sin, a.positions);
          return [a](kern::CudaStream stream) { kern::rope_cuda_simt(a, stream); };
        }));
    v.push_back({"cpu_eigen", nullptr,
                 [](Data& d) {
                   const Shape& s = d.shape;
                   const int64_t half = s.d_r / 2;
                   auto c = std::make_shared<std::vector<float>>(s.T * half);
                   auto sn = std::make_shared<std::vector<float>>(s.T * half);
                   for (int64_t t = 0; t < s.T; ++t) {
                     const int64_t p = int64_t(d.positions.get(t));
                     for (int64_t i = 0; i < half; ++i) {
                       (*c)[size_t(t * half + i)] = float(d.cos.get(p * half + i));
                       (*sn)[size_t(t * half + i)] = float(d.sin.get(p * half + i));
                     }
                   }
                   auto x = std::make_shared<std::vector<float>>(d.x.numel());
                   return Runner{.run =
                                     [&d, c, sn, x] {
                                       const Shape& s = d.shape;
                                       for (int64_t i = 0; i < d.x.numel(); ++i)
                                         (*x)[size_t(i)] = float(d.x.get(i));
                                       ref::rope<float>(s.T, s.n_h, s.d_r, d.form(), false,
                                                        x->data(), c->data(), sn->data(),
                                                        x->data());
                                       for (int64_t i = 0; i < d.y.numel(); ++i)
                                         d.y.set(i, (*x)[size_t(i)]);
                                     },
                                 .resolved_isa = "baseline"};
                 },
                 true});
    return v;
  }
};

}  // namespace

std::unique_ptr<OpBase> make_rope_op() { return make_op<Rope>(); }

}  // namespace v3b::bench
