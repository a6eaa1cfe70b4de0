// Routed and shared experts: everything the suite knows about this op.
#include "reference/spec/moe_experts.h"

#include <algorithm>
#include <cmath>
#include <memory>
#include <vector>

#include "bench/harness/cuda_mirror.h"
#include "bench/harness/op.h"
#include "bench/ops/gemm_common.h"
#include "bench/ops/moe_bank.h"
#include "bench/ops/moe_packed.h"
#include "bench/ops/registry.h"
#include "kernels/moe/moe.h"
#include "kernels/moe/moe_experts_cuda.h"
#include "kernels/moe/moe_libs_cuda.h"
#include "reference/fp8_quant.h"
#include "reference/moe.h"
#include "reference/spec/fp8_quant.h"
#include "reference/synthetic_routes.h"

namespace v3b::bench {
namespace {

// The float64 reference of a call beyond this is cut to some of its tokens; the others are not
// judged.
constexpr double kReferenceFlop = 2e10;

struct MoeExperts {
  static constexpr const char* name = "moe_experts";
  using Shape = spec::MoeExpertsShape;

  static bool fp8_rows(const Shape& s) { return s.dtype == spec::DType::f8e4m3; }

  using Bank = MoeBank;
  struct Data {
    Shape shape;
    HostTensor x, x_scale, idx, weight, y;  // x_scale [T, ceil(d/128)]: of E4M3 x
    Bank experts, shared;
    std::vector<spec::FfnPointers> views;
    std::vector<HostTensor*> tensors() {
      std::vector<HostTensor*> t{&x, &idx, &weight, &y};
      if (fp8_rows(shape)) t.push_back(&x_scale);
      for (Bank* b : {&experts, &shared})
        for (int i = 0; i < 3 && b->E > 0; ++i) {
          t.push_back(&b->w[i]);
          if (b->fp8()) t.push_back(&b->scale[i]);
        }
      return t;
    }
    spec::MoeExpertsArgs args() {
      const Shape& s = shape;
      views.clear();
      for (int64_t e = 0; e < s.E; ++e) views.push_back(experts.view(e));
      return {s.T,
              s.d,
              s.m,
              s.E,
              s.K,
              s.shared_m,
              s.dtype,
              s.w_dtype,
              x.data(),
              idx.as<int32_t>(),
              weight.as<float>(),
              views.data(),
              s.shared_m > 0 ? shared.view(0) : spec::FfnPointers{},
              y.data(),
              s.moe_accum,
              fp8_rows(s) ? x_scale.as<float>() : nullptr};
    }
  };

  static void validate(const Shape& s) {
    using enum spec::DType;
    const auto refuse = [](const char* what, const char* expected) {
      throw Error(ExitCode::usage, what, "--case of moe_experts", expected, "");
    };
    if (s.T < 1 || s.d < 1 || s.m < 1 || s.E < 1 || s.E > 1024 || s.K < 1 || s.K > s.E ||
        s.shared_m < 0)
      refuse("size out of range", "T, d, m >= 1, 1 <= K <= E <= 1024, shared_m >= 0");
    if (s.T > (int64_t{1} << 24)) refuse("too many routes", "T <= 2^24");
    if (s.dtype != f32 && s.dtype != bf16 && !fp8_rows(s))
      refuse("x has no such dtype", "dtype=f32, bf16 or f8e4m3");
    if (fp8_rows(s) && (s.w_dtype != f8e4m3 || s.moe_accum != spec::MoeAccum::fp32))
      refuse("FP8 rows go with other types", "w_dtype=f8e4m3, moe_accum=fp32");
    if (s.w_dtype != f32 && s.w_dtype != bf16 && s.w_dtype != f8e4m3)
      refuse("weights have no such dtype", "w_dtype=f32, bf16 or f8e4m3");
    if ((s.zipf != 0) + (s.hot != 0) + (s.ratio != 0) > 1 || !(s.zipf >= 0) || s.hot < 0 ||
        !(s.ratio == 0 || s.ratio >= 1))
      refuse("routes", "one of zipf > 0, hot > 0, ratio >= 1, or none");
  }
  // From the shape alone, so that cost() knows which experts are read.
  static std::vector<int32_t> routes(const Shape& s) {
    return ref::synthetic_routes(s.T, s.E, s.K, {s.zipf, s.hot, s.ratio}, 1);
  }
  static std::vector<int64_t> loads(const Shape& s) {
    std::vector<int64_t> n(size_t(s.E), 0);
    for (int32_t e : routes(s)) ++n[size_t(e)];
    return n;
  }

  static std::unique_ptr<Data> make(const Shape& s, Fill, uint64_t seed) {
    validate(s);
    auto d = std::make_unique<Data>();
    d->shape = s;
    d->x = HostTensor("x", Role::input, s.dtype, {s.T, s.d});
    d->idx = HostTensor("idx", Role::input, spec::DType::i32, {s.T, s.K});
    d->weight = HostTensor("weight", Role::input, spec::DType::f32, {s.T, s.K});
    d->y = HostTensor("y", Role::output, fp8_rows(s) ? spec::DType::bf16 : s.dtype, {s.T, s.d});
    if (fp8_rows(s)) {
      d->x_scale =
          HostTensor("x_scale", Role::input, spec::DType::f32, {s.T, spec::fp8_blocks(s.d)});
      HostTensor wide("x", Role::input, spec::DType::f32, {s.T, s.d});
      wide.fill_real(seed);
      ref::fp8_quantize_act<float>(s.T, s.d, wide.as<float>(), d->x.as<spec::f8e4m3>(),
                                   d->x_scale.as<float>());
    } else {
      d->x.fill_real(seed);
    }
    const auto r = routes(s);
    std::copy(r.begin(), r.end(), d->idx.as<int32_t>());
    d->weight.fill_real(seed + 1, 0.3, false);
    for (int64_t i = 0; i < d->weight.numel(); ++i)
      d->weight.set(i, 2.5 / double(s.K) * std::exp(d->weight.get(i)));
    d->experts = MoeBank::make(s, "", s.E, s.m, seed + 20);
    if (s.shared_m > 0) d->shared = MoeBank::make(s, "shared_", 1, s.shared_m, seed + 60);
    const auto n = loads(s);
    for (int64_t e = 0; e < s.E; ++e)
      for (int i = 0; i < 3 && n[size_t(e)] == 0; ++i) {  // law 4: nobody may read these
        d->experts.w[i].fill_nan_rows(e, 1);
        if (d->experts.fp8()) d->experts.scale[i].fill_nan_rows(e, 1);
      }
    return d;
  }

  static std::vector<int64_t> judged_tokens(const Shape& s) {
    const double each = 6 * double(s.d) * (double(s.m) * double(s.K) + double(s.shared_m));
    const int64_t n =
        std::clamp<int64_t>(int64_t(kReferenceFlop / each), std::min<int64_t>(s.T, 4), s.T);
    std::vector<int64_t> t;
    for (int64_t i = 0; i < n; ++i) t.push_back(n == 1 ? 0 : i * (s.T - 1) / (n - 1));
    return t;
  }
  static double scale_of_x(const Data& d, int64_t t, int64_t j) {
    return double(d.x_scale.as<float>()[t * spec::fp8_blocks(d.shape.d) + j / 128]);
  }
  static ref::Hidden hidden_of(const Shape& s) {
    return fp8_rows(s) ? ref::Hidden::fp8 : ref::Hidden::exact;
  }
  // Expert by expert, so that one expert's float64 copy is in memory at a time.
  static Expected reference(const Data& d) {
    const Shape& s = d.shape;
    const auto tokens = judged_tokens(s);
    const int64_t n = static_cast<int64_t>(tokens.size());
    std::vector<double> x(size_t(n * s.d)), w(size_t(n * s.K)), sum(size_t(n * s.d), 0.0),
        part(sum.size());
    std::vector<int32_t> idx(size_t(n * s.K)), only(idx.size());
    for (int64_t i = 0; i < n; ++i) {
      d.x.read(tokens[size_t(i)] * s.d, s.d, x.data() + i * s.d);
      for (int64_t j = 0; j < s.d && fp8_rows(s); ++j)
        x[size_t(i * s.d + j)] *= scale_of_x(d, tokens[size_t(i)], j);
      d.weight.read(tokens[size_t(i)] * s.K, s.K, w.data() + i * s.K);
      std::copy_n(d.idx.as<int32_t>() + tokens[size_t(i)] * s.K, s.K, idx.data() + i * s.K);
    }
    std::vector<double> gate, up, down;
    const auto add = [&](const Bank& b, int64_t e, int64_t K, const int32_t* routes,
                         const double* weight) {
      b.values(0, e, gate), b.values(1, e, up), b.values(2, e, down);
      ref::moe<double>(n, s.d, b.m, 1, K, x.data(), routes, weight,
                       {{gate.data(), up.data(), down.data()}}, {}, 0, part.data(), s.moe_accum,
                       hidden_of(s));
      for (size_t i = 0; i < sum.size(); ++i)
        sum[i] =
            s.moe_accum == spec::MoeAccum::bf16 ? ref::add_bf16(sum[i], part[i]) : sum[i] + part[i];
    };
    for (int64_t e = 0; e < s.E; ++e) {
      bool any = false;
      for (size_t i = 0; i < idx.size(); ++i) {
        only[i] = idx[i] == e ? 0 : -1;
        any |= idx[i] == e;
      }
      if (any) add(d.experts, e, s.K, only.data(), w.data());
    }
    if (s.shared_m > 0) {
      const std::vector<int32_t> all(size_t(n), 0);
      const std::vector<double> ones(size_t(n), 1.0);
      add(d.shared, 0, 1, all.data(), ones.data());
    }
    ExpectedTensor y{.name = "y"};
    y.values.assign(size_t(s.T * s.d), 0.0);
    y.skip.assign(y.values.size(), 1);
    for (int64_t i = 0; i < n; ++i) {
      const int64_t at = tokens[size_t(i)] * s.d;
      std::copy_n(sum.data() + i * s.d, s.d, y.values.data() + at);
      std::fill_n(y.skip.data() + at, s.d, uint8_t{0});
    }
    Expected e;
    e.tensors.push_back(std::move(y));
    return e;
  }

  static Cost cost(const Shape& s) {
    const auto n = loads(s);
    const double chosen = double(s.E - std::count(n.begin(), n.end(), 0)),
                 y = double(spec::dtype_bytes(fp8_rows(s) ? spec::DType::bf16 : s.dtype)),
                 x = fp8_rows(s) ? 1 + 4.0 / 128 : y;
    double weights = 3 * double(s.d) * (chosen * double(s.m) + double(s.shared_m)) *
                     double(spec::dtype_bytes(s.w_dtype));
    if (s.w_dtype == spec::DType::f8e4m3) weights *= 1 + 4.0 / (128 * 128);
    return {6 * double(s.d) * double(s.T) * (double(s.m) * double(s.K) + double(s.shared_m)),
            weights + double(s.T) * double(s.d) * (x + y) + 8 * double(s.T) * double(s.K),
            s.dtype == spec::DType::f32 ? "f32" : "bf16", double(s.T) * double(s.d) * y};
  }
  static Tolerance tolerance(const Shape& s, Fill, const std::string&) {
    // moe_accum=bf16: reference and kernel round at the same places, but an output that lies beside a
    // rounding boundary goes either way. Each of the K + 1 terms is rounded up to three times, 1.66e-3
    // RMS apart at worst, and a flip is one bf16 step (2^-8) of a partial sum.
    if (s.moe_accum == spec::MoeAccum::bf16) {
      const double terms = double(s.K) + 1;
      return {.rel_fro = 3e-3 + 1.66e-3 * std::sqrt(3 * terms),
              .abs_rms = 2.1e-2 + 0x1p-8 * terms,
              .rel = 0x1p-8 * 1.01};
    }
    // bf16: hidden rounded once and y once (1.66e-3 RMS each, 2.35e-3 together; a quarter more for
    // outputs of a few hundred elements). An element is off by its own rounding and by up to five
    // deviations of the hidden's, 8.3e-3 of its row's size (a larger one is rarer than 1 in 10^6);
    // y goes with the square of x, whose outlier channels make rows up to 2.5 times the common size.
    if (s.dtype == spec::DType::bf16)
      return {.rel_fro = 3e-3, .abs_rms = 2.1e-2, .rel = 0x1p-8 * 1.01};
    // FP8 rows: reference and kernel quantise the hidden rows alike, but the kernel's fp32 sums are some 1e-6 of their size
    // off, so that 3e-4 of the hidden elements round to bf16 the other way (steps of 2^-8), and a twentieth of these to
    // another code. A code is up to 1/8 of its element (0.5 deviations for one of four), and one of m that make a sum.
    if (fp8_rows(s)) {
      const double m = double(s.shared_m > 0 ? std::min(s.m, s.shared_m) : s.m);
      return {.rel_fro = 6e-3, .abs_rms = 2.1e-2 + 0.5 / std::sqrt(m), .rel = 0x1p-8 * 1.01};
    }
    // fp32: two products in a chain; sums of k terms in any order.
    const double k = double(std::max({s.d, s.m, s.shared_m}));
    return {.rel_fro = 1e-5, .abs_rms = 16 * std::sqrt(k) * 0x1p-24, .rel = 0x1p-22};
  }

  // Tiles of 16 rows are the least that the emulation computes.
  static Support emulation_limit(const Shape& s) {
    const double rows = std::max(double(s.T * s.K), 16.0 * double(std::min(s.E, s.T * s.K)));
    return cuda_emulation_limit(
        6 * double(s.d) * (rows * double(s.m) + std::max(double(s.T), 16.0) * double(s.shared_m)));
  }
  template <class F>
  static CudaPrepare<MoeExperts> on_device(F entry) {
    return [entry](Data& d, CudaMirror& m) {
      auto a = d.args();
      const auto map = [&m](spec::FfnPointers& f) {
        m.map(f.gate, f.up, f.down, f.gate_scale, f.up_scale, f.down_scale);
      };
      std::vector<spec::FfnPointers> experts(a.experts, a.experts + a.E);
      for (auto& e : experts) map(e);
      map(a.shared);
      m.map(a.x, a.idx, a.weight, a.y, a.x_scale);
      a.experts = static_cast<const spec::FfnPointers*>(
          m.upload(experts.data(), int64_t(experts.size() * sizeof(spec::FfnPointers))));
      void* scratch = m.scratch(kern::moe_experts_cuda_scratch_bytes(a));
      return [=](kern::CudaStream s) { entry(a, scratch, s); };
    };
  }

  // The routes are counted on the host when the plan is made (kernels/moe/moe_libs_cuda.h).
  static std::function<void(kern::CudaStream)> cublas(Data& d, CudaMirror& m) {
    auto a = d.args();
    const auto map = [&m](spec::FfnPointers& f) { m.map(f.gate, f.up, f.down); };
    std::vector<spec::FfnPointers> experts(a.experts, a.experts + a.E);
    for (auto& e : experts) map(e);
    map(a.shared);
    const int32_t* routes = a.idx;
    m.map(a.x, a.idx, a.weight, a.y);
    a.experts = experts.data();
    void* scratch = m.scratch(kern::moe_experts_cublas_scratch_bytes(a));
    const std::shared_ptr<kern::MoeCublasPlan> plan(
        kern::moe_cublas_plan(a, routes, scratch, kern::cuda_stream()), kern::moe_cublas_free);
    return [=](kern::CudaStream s) { kern::moe_experts_cuda_cublas(*plan, s); };
  }
  static Support cublas_form(const Shape& s) {
    if (s.dtype != s.w_dtype || fp8_rows(s) || s.moe_accum != spec::MoeAccum::fp32 ||
        (s.dtype == spec::DType::bf16 && (s.d % 8 != 0 || s.m % 8 != 0 || s.shared_m % 8 != 0)))
      return {Support::State::unsupported,
              "the library form takes bf16 (d, m multiples of 8) or f32 throughout, fp32 sums"};
    return library_support(kern::moe_cublas_missing());
  }
  // bf16: gate, up, hidden and the experts' rows are rounded between the library's steps, 1.66e-3 RMS each: the hidden
  // rows are off by 3.4e-3, SPEC 1.0's class for routed experts; elements as derived above with twice the deviation.
  static Tolerance cublas_tolerance(const Shape& s, Fill fill, const std::string& output) {
    if (s.dtype != spec::DType::bf16) return tolerance(s, fill, output);
    return {.rel_fro = 6e-3, .abs_rms = 4.2e-2, .rel = 0x1p-8 * 1.01};
  }

  static std::vector<Case<Shape>> cases();
  static std::vector<Impl<MoeExperts>> impls();
};

std::vector<Case<spec::MoeExpertsShape>> MoeExperts::cases() {
  using enum spec::DType;
  constexpr auto hot = CacheState::hot, cold = CacheState::cold;
  std::vector<Case<Shape>> c;
  const auto v3 = [&](int64_t T, int64_t E, spec::DType w, Size size) {
    c.push_back({{.T = T, .E = E, .w_dtype = w}, size, false, cold});
  };
  const auto lite = [&](int64_t T, spec::DType w, Size size) {
    c.push_back({{.T = T, .d = 2048, .m = 1408, .E = 64, .K = 6, .shared_m = 2816, .w_dtype = w},
                 size,
                 false,
                 cold});
  };
  const auto tiny = [&](Shape s, Size size) {
    s.d = 256, s.m = 80, s.E = 16, s.K = 4, s.shared_m = 80;
    c.push_back({s, size, false, hot});
  };
  // Every token at each of four experts and the shared one: 1 to 512 rows an expert.
  for (int64_t T : {1, 8, 32, 128, 512})
    for (spec::DType w : {bf16, f8e4m3})
      c.push_back({{.T = T, .E = 4, .K = 4, .w_dtype = w},
                   T <= 32   ? Size::quick
                   : T < 512 ? Size::standard
                             : Size::full,
                   false,
                   cold});
  for (int64_t T : {1, 8, 64}) v3(T, 16, bf16, Size::standard);
  for (int64_t T : {1, 64}) v3(T, 16, f8e4m3, Size::standard);
  for (int64_t T : {8, 512}) v3(T, 32, bf16, Size::full);
  for (int64_t T : {8, 512}) v3(T, 32, f8e4m3, Size::full);
  // E4M3 rows as dispatched, FP8 tensor cores throughout.
  const auto v3_fp8 = [&](int64_t T, int64_t E, Size size) {
    c.push_back({{.T = T, .E = E, .w_dtype = f8e4m3, .dtype = f8e4m3}, size, false, cold});
  };
  v3_fp8(8, 8, Size::standard);
  v3_fp8(64, 16, Size::standard);
  v3_fp8(512, 32, Size::full);
  c.push_back({{.T = 1, .E = 8, .w_dtype = f32, .dtype = f32}, Size::full, false, cold});
  for (int64_t T : {1, 8, 64, 512}) lite(T, bf16, T == 8 || T == 512 ? Size::standard : Size::full);
  for (int64_t T : {8, 512}) lite(T, f8e4m3, Size::full);
  for (int64_t T : {1, 8, 512}) tiny({.T = T}, Size::quick);
  tiny({.T = 8, .w_dtype = f32, .dtype = f32}, Size::quick);
  tiny({.T = 8, .w_dtype = f8e4m3}, Size::standard);
  tiny({.T = 8, .w_dtype = f8e4m3, .dtype = f8e4m3}, Size::quick);
  tiny({.T = 4096}, Size::standard);
  // Time as a function of imbalance.
  tiny({.T = 512, .zipf = 1}, Size::standard);
  tiny({.T = 512, .hot = 4}, Size::standard);
  for (double r : {1.0, 2.0, 4.0}) tiny({.T = 512, .ratio = r}, Size::standard);
  tiny({.T = 64, .moe_accum = spec::MoeAccum::bf16}, Size::quick);
  // Odd shapes, every pair of types, experts that nobody chose.
  for (const auto& [x, w] : {std::pair{f32, f32},
                             {bf16, bf16},
                             {bf16, f8e4m3},
                             {f32, f8e4m3},
                             {f32, bf16},
                             {bf16, f32},
                             {f8e4m3, f8e4m3}}) {
    c.push_back(
        {{.T = 3, .d = 203, .m = 37, .E = 9, .K = 2, .shared_m = 50, .w_dtype = w, .dtype = x},
         Size::quick,
         true});
    c.push_back({{.T = 41,
                  .d = 320,
                  .m = 200,
                  .E = 6,
                  .K = 2,
                  .shared_m = 0,
                  .hot = 3,
                  .w_dtype = w,
                  .dtype = x},
                 Size::quick,
                 true});
  }
  return c;
}

std::vector<Impl<MoeExperts>> MoeExperts::impls() {
  std::vector<Impl<MoeExperts>> v;
  v.push_back(
      {.how = "cpu_simd",
       .support =
           [](const Shape& s) {
             Support ok;
             if (fp8_rows(s))
               ok = {Support::State::unsupported,
                     "no FP8 rows: CPUs have no FP8 products, bf16 rows are as fast"};
             return ok;
           },
       .prepare =
           [](Data& d) {
             auto scratch = std::make_shared<kern::MoeScratch>();
             return Runner{
                 .run = [a = d.args(), scratch] { kern::moe_experts_cpu_simd(a, *scratch); },
                 .resolved_isa = kern::moe_experts_cpu_simd_isa(d.shape.dtype, d.shape.w_dtype)};
           },
       .levels = {kern::Isa::avx2, kern::Isa::avx512, kern::Isa::avx512_bf16, kern::Isa::amx}});
  v.push_back(
      {.how = "cpu_packed",
       .support = packed_experts_support,
       .prepare = [](Data& d) { return packed_experts_runner(d.args(), loads(d.shape)); },
       .levels = {kern::Isa::avx2, kern::Isa::avx512, kern::Isa::avx512_bf16, kern::Isa::amx}});
  v.push_back(cuda_impl<MoeExperts>(
      "cuda_mma",
      [](const Shape& s) {
        if (s.dtype == spec::DType::f32 || s.w_dtype == spec::DType::f32)
          return Support{Support::State::unsupported,
                         "tensor cores take bf16 or f8e4m3 rows and weights only"};
        if (const Support fp8 = cuda_support(89); fp8_rows(s) && fp8.state != Support::State::yes)
          return fp8;
        return emulation_limit(s);
      },
      on_device(kern::moe_experts_cuda_mma)));
  v.push_back(cuda_impl<MoeExperts>(
      "cuda_simt",
      [](const Shape& s) {
        if (fp8_rows(s))
          return Support{Support::State::unsupported, "no FP8 rows: cuda_mma is their form"};
        return emulation_limit(s);
      },
      on_device(kern::moe_experts_cuda_simt)));
  v.push_back(cuda_impl<MoeExperts>("cuda_cublas", cublas_form, cublas, true, 80, true));
  v.back().tolerance = cublas_tolerance;
  v.push_back({"cpu_onednn",
               [](const Shape& s) {
                 Support ok;
                 if (s.dtype != s.w_dtype || fp8_rows(s))
                   ok = {Support::State::unsupported, "the library takes equal types only"};
                 return ok;
               },
               [](Data& d) {
                 auto scratch = std::make_shared<kern::MoeScratch>();
                 return Runner{
                     .run = [a = d.args(), scratch] { kern::moe_experts_cpu_onednn(a, *scratch); },
                     .resolved_isa = "oneDNN"};
               },
               true});
  v.push_back({"cpu_eigen",
               [](const Shape& s) {
                 Support ok;
                 if (cost(s).flop > 6e10)
                   ok = {Support::State::unsupported, "plain form, more than 60 GFLOP a run"};
                 if (3.0 * double(s.d) * (double(s.E) * double(s.m) + double(s.shared_m)) > 4.5e8)
                   ok = {Support::State::unsupported, "plain form keeps fp32 weights, over 1.8 GB"};
                 return ok;
               },
               [](Data& d) {
                 struct Wide {  // fp32 copies of the chosen experts
                   std::vector<std::vector<float>> keep;
                   std::vector<ref::Ffn<float>> experts;
                   ref::Ffn<float> shared;
                   std::vector<float> x, y;
                 };
                 auto w = std::make_shared<Wide>();
                 const Shape& s = d.shape;
                 const auto n = loads(s);
                 const auto widen = [&](const Bank& b, int64_t e) {
                   for (int i = 0; i < 3; ++i) w->keep.push_back(b.values<float>(i, e));
                   const size_t k = w->keep.size();
                   return ref::Ffn<float>{w->keep[k - 3].data(), w->keep[k - 2].data(),
                                          w->keep[k - 1].data()};
                 };
                 for (int64_t e = 0; e < s.E; ++e)
                   w->experts.push_back(n[size_t(e)] > 0 ? widen(d.experts, e) : ref::Ffn<float>{});
                 if (s.shared_m > 0) w->shared = widen(d.shared, 0);
                 w->x.resize(size_t(s.T * s.d));
                 w->y.resize(w->x.size());
                 return Runner{.run =
                                   [&d, w] {
                                     const Shape& s = d.shape;
                                     for (int64_t i = 0; i < d.x.numel(); ++i) {
                                       const double scale =
                                           fp8_rows(s) ? scale_of_x(d, i / s.d, i % s.d) : 1.0;
                                       w->x[size_t(i)] = float(d.x.get(i) * scale);
                                     }
                                     ref::moe<float>(s.T, s.d, s.m, s.E, s.K, w->x.data(),
                                                     d.idx.as<int32_t>(), d.weight.as<float>(),
                                                     w->experts, w->shared, s.shared_m, w->y.data(),
                                                     s.moe_accum, hidden_of(s));
                                     for (int64_t i = 0; i < d.y.numel(); ++i)
                                       d.y.set(i, w->y[size_t(i)]);
                                   },
                               .resolved_isa = "baseline"};
               },
               true});
  return v;
}

}  // namespace

std::unique_ptr<OpBase> make_moe_experts_op() { return make_op<MoeExperts>(); }

}  // namespace v3b::bench
