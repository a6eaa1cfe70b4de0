// Weighted sum of the experts' rows: everything the suite knows about this op.
#include <limits>
#include <memory>
#include <vector>

#include "bench/harness/cuda_mirror.h"
#include "bench/harness/op.h"
#include "bench/ops/registry.h"
#include "kernels/moe/moe.h"
#include "kernels/moe/moe_cuda.h"
#include "reference/moe.h"
#include "reference/spec/moe_dispatch.h"
#include "reference/synthetic_routes.h"

namespace v3b::bench {
namespace {

struct MoeCombine {
  static constexpr const char* name = "moe_combine";
  static constexpr bool exact_fill = true;
  using Shape = spec::MoeCombineShape;
  struct Data {
    Shape shape;
    ref::Dispatch plan;
    HostTensor rows, row, weight, y;
    std::vector<HostTensor*> tensors() { return {&rows, &row, &weight, &y}; }
    spec::MoeCombineArgs args() {
      const Shape& s = shape;
      return {
          s.T,      s.d,        s.K, s.dtype, rows.data(), row.as<int64_t>(), weight.as<float>(),
          y.data(), s.moe_accum};
    }
  };
  static void validate(const Shape& s) {
    if (s.T < 1 || s.d < 1 || s.K < 1 || s.K > s.E)
      throw Error(ExitCode::usage, "size out of range", "--case of moe_combine",
                  "T, d >= 1, 1 <= K <= E", "");
    if (s.dtype != spec::DType::f32 && s.dtype != spec::DType::bf16)
      throw Error(ExitCode::usage, "rows have no such dtype", "--case of moe_combine",
                  "f32 or bf16", spec::dtype_name(s.dtype));
    // The routes are made before anything is measured.
    if (s.T * s.K > int64_t{1} << 27)
      throw Error(ExitCode::usage, "too many routes", "--case of moe_combine", "T*K <= 2^27",
                  std::to_string(s.T * s.K));
  }
  static std::unique_ptr<Data> make(const Shape& s, Fill fill, uint64_t seed) {
    auto d = std::make_unique<Data>();
    d->shape = s;
    using enum spec::DType;
    d->rows = HostTensor("rows", Role::input, s.dtype, {s.T * s.K, s.d});
    d->row = HostTensor("row", Role::input, i64, {s.T, s.K});
    d->weight = HostTensor("weight", Role::input, f32, {s.T, s.K});
    d->y = HostTensor("y", Role::output, s.dtype, {s.T, s.d});
    auto routes = ref::synthetic_routes(s.T, s.E, s.K, {}, seed);
    if (s.K > 1)  // some slots are unused (dropped by capacity); nothing may be read for them
      for (size_t i = 3; i < routes.size(); i += 17) routes[i] = -1;
    d->plan = ref::dispatch(s.T, s.K, s.E, routes.data());
    std::copy(d->plan.row.begin(), d->plan.row.end(), d->row.as<int64_t>());
    if (fill == Fill::exact) {
      d->rows.fill_exact(seed + 1);
      d->weight.fill_exact(seed + 2);
    } else {
      d->rows.fill_real(seed + 1);
      d->weight.fill_real(seed + 2, 0.3, false);
    }
    const int64_t used = d->plan.offsets[s.E];
    if (used < s.T * s.K) d->rows.fill_nan_rows(used, s.T * s.K - used);
    for (int64_t i = 0; i < s.T * s.K; ++i)
      if (routes[size_t(i)] < 0) d->weight.set(i, std::numeric_limits<double>::quiet_NaN());
    return d;
  }
  static Expected reference(const Data& d) {
    const Shape& s = d.shape;
    std::vector<double> y(size_t(d.y.numel()));
    ref::combine_rows<double>(d.plan, s.T, s.K, s.d, d.rows.to_doubles().data(),
                              d.weight.to_doubles().data(), y.data(), s.moe_accum);
    Expected e;
    e.tensors.push_back({.name = "y", .values = std::move(y)});
    return e;
  }
  static Cost cost(const Shape& s) {
    const double n = double(s.T) * double(s.K) * double(s.d),
                 e = double(spec::dtype_bytes(s.dtype));
    return {2 * n, n * e + double(s.T) * double(s.d) * e + 12 * double(s.T) * double(s.K), "f32",
            double(s.T) * double(s.d) * e};
  }
  static Tolerance tolerance(const Shape& s, Fill fill, const std::string&) {
    // Products and sums in float32 from the same bf16 values in the same order: the same bits.
    if (s.moe_accum == spec::MoeAccum::bf16) return {};
    if (fill == Fill::exact) return {};  // sums of at most K*9: exact in bf16 too up to K = 28
    // K products summed in fp32: each partial sum is rounded at 2^-24 of its size.
    const double sums = 2 * double(s.K) * 0x1p-24;
    if (s.dtype == spec::DType::f32) return {.rel_fro = 1e-6, .abs_rms = 8 * sums, .rel = sums};
    return {.rel_fro = 3e-3, .abs_rms = 8 * sums, .rel = 0x1p-8 * 1.01};
  }
  static std::vector<Case<Shape>> cases() {
    using enum spec::DType;
    std::vector<Case<Shape>> c;
    c.push_back({{.T = 512}, Size::quick});
    c.push_back({{.T = 8}, Size::standard});
    c.push_back({{.T = 512, .d = 256, .E = 16, .K = 4},
                 Size::standard,
                 false,
                 CacheState::hot});  // tiny-v3
    c.push_back({{.T = 512, .d = 2048, .E = 64, .K = 6}, Size::full});
    c.push_back({{.T = 512, .dtype = f32}, Size::full});
    c.push_back({{.T = 13, .d = 37, .E = 5, .K = 3, .dtype = f32}, Size::quick, true});
    c.push_back({{.T = 5, .d = 130, .E = 4, .K = 1}, Size::quick, true});
    constexpr auto accum = spec::MoeAccum::bf16;
    c.push_back({{.T = 512, .moe_accum = accum}, Size::full});
    c.push_back({{.T = 13, .d = 37, .E = 9, .K = 6, .moe_accum = accum}, Size::quick, true});
    c.push_back(
        {{.T = 7, .d = 70, .E = 8, .K = 8, .moe_accum = accum, .dtype = f32}, Size::quick, true});
    return c;
  }
  static std::vector<Impl<MoeCombine>> impls() {
    std::vector<Impl<MoeCombine>> v;
    v.push_back({.how = "cpu_simd",
                 .prepare =
                     [](Data& d) {
                       return Runner{.run = [a = d.args()] { kern::moe_combine_cpu_simd(a); },
                                     .resolved_isa = kern::moe_dispatch_cpu_simd_isa()};
                     },
                 .levels = {kern::Isa::avx2, kern::Isa::avx512}});
    v.push_back(cuda_impl<MoeCombine>("cuda_simt", nullptr, [](Data& d, CudaMirror& m) {
      auto a = d.args();
      m.map(a.rows, a.row, a.weight, a.y);
      return [a](kern::CudaStream stream) { kern::moe_combine_cuda_simt(a, stream); };
    }));
    v.push_back({"cpu_eigen", nullptr,
                 [](Data& d) {  // the plain form on fp32 copies of the rows
                   const auto wide = d.rows.to_doubles();
                   auto rows = std::make_shared<std::vector<float>>(wide.begin(), wide.end());
                   auto y = std::make_shared<std::vector<float>>(size_t(d.y.numel()));
                   return Runner{.run =
                                     [&d, rows, y] {
                                       const Shape& s = d.shape;
                                       ref::combine_rows<float>(d.plan, s.T, s.K, s.d, rows->data(),
                                                                d.weight.as<float>(), y->data(),
                                                                s.moe_accum);
                                       for (int64_t i = 0; i < d.y.numel(); ++i)
                                         d.y.set(i, (*y)[size_t(i)]);
                                     },
                                 .resolved_isa = "baseline"};
                 },
                 true});
    return v;
  }
};

}  // namespace

std::unique_ptr<OpBase> make_moe_combine_op() { return make_op<MoeCombine>(); }

}  // namespace v3b::bench
