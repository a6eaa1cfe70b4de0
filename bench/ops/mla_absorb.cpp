// The absorbed projections of MLA decode, a product a head: everything the suite knows about this op.
#include "kernels/gemm/mla_absorb.h"

#include <cmath>
#include <memory>
#include <vector>

#include "bench/harness/cuda_mirror.h"
#include "bench/harness/op.h"
#include "bench/ops/gemm_common.h"
#include "bench/ops/registry.h"
#include "kernels/gemm/gemm_libs_cuda.h"
#include "kernels/gemm/gemv.h"
#include "kernels/gemm/packed_ops.h"
#include "reference/gemm.h"
#include "reference/rmsnorm.h"

namespace v3b::bench {
namespace {

using spec::DType;

struct MlaAbsorb {
  static constexpr const char* name = "mla_absorb";
  static constexpr bool exact_fill = true;
  using Shape = spec::MlaAbsorbShape;

  struct Data {
    Shape shape;
    Fill fill = Fill::real;
    HostTensor x, w, y;
    std::vector<HostTensor*> tensors() { return {&x, &w, &y}; }
    spec::MlaAbsorbArgs args() {
      return {shape.T, shape.n_h, shape.n, shape.k, shape.dtype, x.data(), w.data(), y.data()};
    }
  };

  static std::unique_ptr<Data> make(const Shape& s, Fill fill, uint64_t seed) {
    auto d = std::make_unique<Data>();
    d->shape = s;
    d->fill = fill;
    d->x = HostTensor("x", Role::input, s.dtype, {s.T, s.n_h, s.k});
    d->w = HostTensor("w", Role::input, s.dtype, {s.n_h, s.n, s.k});
    d->y = HostTensor("y", Role::output, s.dtype, {s.T, s.n_h, s.n});
    if (fill == Fill::exact) {
      d->x.fill_exact(seed);
      d->w.fill_exact(seed + 1);
    } else {
      d->x.fill_real(seed);
      d->w.fill_real(seed + 1, 1.0 / std::sqrt(double(s.k)), false);
    }
    return d;
  }

  template <class S>
  static void products(const Shape& s, const S* x, const S* w, S* y) {
    for (int64_t h = 0; h < s.n_h; ++h)
      ref::gemm<S>(s.T, s.n, s.k, x + h * s.k, s.n_h * s.k, false, w + h * s.n * s.k, s.k, true,
                   y + h * s.n, s.n_h * s.n);
  }
  static Expected reference(const Data& d) {
    const Shape& s = d.shape;
    const std::vector<double> x = d.x.to_doubles(), w = d.w.to_doubles();
    ExpectedTensor y{.name = "y"};
    y.values.resize(size_t(s.T * s.n_h * s.n));
    products<double>(s, x.data(), w.data(), y.values.data());
    if (d.fill == Fill::exact)
      for (double& v : y.values) v = ref::round_to(v, s.dtype);
    Expected e;
    e.tensors.push_back(std::move(y));
    return e;
  }

  static Cost cost(const Shape& s) {
    const double t = double(s.T), h = double(s.n_h), n = double(s.n), k = double(s.k),
                 e = double(spec::dtype_bytes(s.dtype));
    return {2 * t * h * n * k, (h * n * k + t * h * (n + k)) * e,
            s.dtype == DType::bf16 ? "bf16" : "f32", t * h * n * e};
  }
  static Tolerance tolerance(const Shape& s, Fill fill, const std::string&) {
    return product_tolerance(fill, s.k, s.dtype);
  }

  static std::vector<Case<Shape>> cases() {
    using enum spec::DType;
    std::vector<Case<Shape>> c;
    for (const auto& [n, k] : {std::pair<int64_t, int64_t>{512, 128}, {128, 512}}) {
      for (const int64_t T : {1, 8, 64})  // V3: 128 heads
        c.push_back({{.T = T, .n = n, .k = k}, T == 8 ? Size::quick : Size::standard});
      for (const int64_t T : {1, 8})  // V2-Lite
        c.push_back({{.T = T, .n_h = 16, .n = n, .k = k}, Size::standard, false, CacheState::hot});
      c.push_back({{.T = 256, .n = n, .k = k}, Size::full});
    }
    for (const DType t : {bf16, f32})
      for (const auto& s :
           {std::array<int64_t, 4>{1, 1, 1, 1}, {3, 5, 7, 9}, {17, 3, 33, 40}, {40, 4, 70, 130}})
        c.push_back(
            {{.T = s[0], .n_h = s[1], .n = s[2], .k = s[3], .dtype = t}, Size::quick, true});
    return c;
  }

  static std::vector<Impl<MlaAbsorb>> impls() {
    std::vector<Impl<MlaAbsorb>> v;
    v.push_back({"cpu_simd",
                 nullptr,
                 [](Data& d) {
                   const auto a = d.args();
                   return Runner{.run = [a] { kern::mla_absorb_cpu_simd(a); },
                                 .resolved_isa = kern::gemm_isa(kern::head_products(a).g)};
                 },
                 false,
                 {kern::Isa::avx2, kern::Isa::avx512, kern::Isa::avx512_bf16, kern::Isa::amx}});
    v.push_back({"cpu_packed",
                 nullptr,
                 [](Data& d) {
                   const auto a = d.args();
                   auto w = std::make_shared<kern::PackedHeads>(
                       kern::HeadsSource{a.dtype, a.n_h, a.n, a.k, a.w, a.k, a.n * a.k});
                   return Runner{.run = [a, w] { kern::mla_absorb_cpu_packed(a, *w); },
                                 .resolved_isa = kern::packed_isa(a.dtype, a.dtype)};
                 },
                 false,
                 {kern::Isa::avx2, kern::Isa::avx512, kern::Isa::avx512_bf16, kern::Isa::amx}});
    v.push_back(cuda_impl<MlaAbsorb>(
        "cuda_mma",
        [](const Shape& s) {
          if (s.dtype != DType::bf16)
            return Support{Support::State::unsupported, "tensor cores take bf16 only"};
          return cuda_emulation_limit(2 * double(std::max<int64_t>(s.T, 16)) * double(s.n_h) *
                                      double(s.n) * double(s.k));
        },
        [](Data& d, CudaMirror& m) {
          auto a = d.args();
          m.map(a.x, a.w, a.y);
          return [a](kern::CudaStream s) { kern::mla_absorb_cuda_mma(a, s); };
        }));
    v.push_back(cuda_impl<MlaAbsorb>(
        "cuda_cublaslt",
        [](const Shape& s) {
          return library_support(kern::cublaslt_refuses(
              spec::MlaAbsorbArgs{s.T, s.n_h, s.n, s.k, s.dtype, nullptr, nullptr, nullptr}));
        },
        [](Data& d, CudaMirror& m) {
          auto a = d.args();
          m.map(a.x, a.w, a.y);
          const std::shared_ptr<kern::CublasLtPlan> plan(kern::cublaslt_plan(a),
                                                         kern::cublaslt_free);
          void* scratch = m.scratch(kern::kCublasLtScratchBytes);
          return [=](kern::CudaStream s) { kern::mla_absorb_cuda_cublaslt(a, *plan, scratch, s); };
        },
        true, 80, true));
    v.push_back({"cpu_onednn", nullptr,
                 [](Data& d) {
                   return Runner{.run = [a = d.args()] { kern::mla_absorb_cpu_onednn(a); },
                                 .resolved_isa = kern::gemm_onednn_isa()};
                 },
                 true});
    v.push_back({"cpu_eigen", nullptr,
                 [](Data& d) {
                   struct Wide {
                     std::vector<float> x, w, y;
                   };
                   auto f = std::make_shared<Wide>();
                   for (int64_t i = 0; i < d.x.numel(); ++i) f->x.push_back(float(d.x.get(i)));
                   for (int64_t i = 0; i < d.w.numel(); ++i) f->w.push_back(float(d.w.get(i)));
                   f->y.resize(size_t(d.y.numel()));
                   return Runner{.run =
                                     [&d, f] {
                                       products<float>(d.shape, f->x.data(), f->w.data(),
                                                       f->y.data());
                                       for (int64_t i = 0; i < d.y.numel(); ++i)
                                         d.y.set(i, f->y[size_t(i)]);
                                     },
                                 .resolved_isa = "baseline"};
                 },
                 true});
    return v;
  }
};

}  // namespace

std::unique_ptr<OpBase> make_mla_absorb_op() { return make_op<MlaAbsorb>(); }

}  // namespace v3b::bench
