// Output head with cross-entropy: everything the suite knows about this op.
#include "kernels/gemm/lm_head_ce.h"

#include <cmath>
#include <limits>
#include <vector>

#include "bench/harness/cuda_mirror.h"
#include "bench/harness/op.h"
#include "bench/ops/gemm_common.h"
#include "bench/ops/registry.h"
#include "kernels/gemm/gemm.h"
#include "kernels/gemm/packed_ops.h"
#include "kernels/gemm/rows_cuda.h"
#include "reference/cross_entropy.h"
#include "reference/gemm.h"

namespace v3b::bench {
namespace {

using spec::DType;

struct LmHeadCe {
  static constexpr const char* name = "lm_head_ce";
  using Shape = spec::LmHeadCeShape;

  struct Data {
    Shape shape;
    HostTensor h, w, labels, nll, lse, argmax;
    std::vector<HostTensor*> tensors() { return {&h, &w, &labels, &nll, &lse, &argmax}; }
    spec::LmHeadCeArgs args() {
      return {shape.T,
              shape.d,
              shape.V,
              shape.dtype,
              h.data(),
              w.data(),
              labels.as<int64_t>(),
              nll.as<float>(),
              lse.as<float>(),
              argmax.as<int32_t>()};
    }
  };

  static std::unique_ptr<Data> make(const Shape& s, Fill, uint64_t seed) {
    auto d = std::make_unique<Data>();
    d->shape = s;
    d->h = HostTensor("h", Role::input, s.dtype, {s.T, s.d});
    d->w = HostTensor("w", Role::input, s.dtype, {s.V, s.d});
    d->labels = HostTensor("labels", Role::input, DType::i64, {s.T});
    d->nll = HostTensor("nll", Role::output, DType::f32, {s.T});
    d->lse = HostTensor("lse", Role::output, DType::f32, {s.T});
    d->argmax = HostTensor("argmax", Role::output, DType::i32, {s.T, 1});
    d->h.fill_real(seed);
    d->w.fill_real(seed + 1, 1.0 / std::sqrt(double(s.d)), false);
    auto* labels = d->labels.as<int64_t>();
    for (int64_t t = 0; t < s.T;
         ++t)  // spread over the vocabulary, the last id and ignored rows among them
      labels[t] = t % 7 == 3 ? spec::kIgnoreLabel : t % 7 == 5 ? s.V - 1 : (t * 7919 + 13) % s.V;
    return d;
  }

  static Expected reference(const Data& d) {
    const Shape& s = d.shape;
    constexpr int64_t kSlice = 2048;  // of the vocabulary: [V, d] in float64 would be 7 GB for V3
    const std::vector<double> h = d.h.to_doubles();
    const int64_t slices = (s.V + kSlice - 1) / kSlice;
    std::vector<double> z, w, part(size_t(s.T * slices)), label(size_t(s.T), 0.0);
    const double low = -std::numeric_limits<double>::infinity();
    std::vector<double> best(size_t(s.T), low), second(size_t(s.T), low), arg(size_t(s.T), 0.0);
    for (int64_t b = 0; b < slices; ++b) {
      const int64_t v0 = b * kSlice, n = std::min(kSlice, s.V - v0);
      w.resize(size_t(n * s.d));
      z.resize(size_t(s.T * n));
      d.w.read(v0 * s.d, n * s.d, w.data());
      ref::linear<double>(s.T, s.d, n, h.data(), w.data(), z.data());
      for (int64_t t = 0; t < s.T; ++t) {
        const double* row = z.data() + t * n;
        const int64_t y = d.labels.as<int64_t>()[t];
        part[size_t(t * slices + b)] = ref::logsumexp<double>(n, row);
        if (y >= v0 && y < v0 + n) label[size_t(t)] = row[y - v0];
        for (int64_t v = 0; v < n; ++v) {
          if (row[v] > best[size_t(t)]) {
            second[size_t(t)] = best[size_t(t)];
            best[size_t(t)] = row[v];
            arg[size_t(t)] = double(v0 + v);
          } else if (row[v] > second[size_t(t)]) {
            second[size_t(t)] = row[v];
          }
        }
      }
    }
    ExpectedTensor lse{.name = "lse"}, nll{.name = "nll"}, argmax{.name = "argmax"};
    for (int64_t t = 0; t < s.T; ++t) {
      const double l = ref::logsumexp<double>(slices, part.data() + t * slices);
      lse.values.push_back(l);
      nll.values.push_back(d.labels.as<int64_t>()[t] == spec::kIgnoreLabel ? 0.0
                                                                           : l - label[size_t(t)]);
      argmax.route_gap.push_back(s.V > 1 ? best[size_t(t)] - second[size_t(t)] : 1.0);
    }
    argmax.values = std::move(arg);
    argmax.route_k = 1;
    argmax.route_gap_bound = 1e-5;  // fp32 sums: SPEC 0.6
    Expected e;
    e.tensors.push_back(std::move(lse));
    e.tensors.push_back(std::move(nll));
    e.tensors.push_back(std::move(argmax));
    return e;
  }

  static Cost cost(const Shape& s) {
    const double t = double(s.T), d = double(s.d), v = double(s.V),
                 e = double(spec::dtype_bytes(s.dtype));
    return {2 * t * d * v, (v * d + t * d) * e + 20 * t, s.dtype == DType::bf16 ? "bf16" : "f32",
            12 * t};
  }

  // Loss from fp32 sums: 1e-5 (SPEC 1.0); lse itself carries a rounding of its own size.
  static Tolerance tolerance(const Shape&, Fill, const std::string&) {
    return {.rel_fro = 1e-5, .rel = 1e-6, .abs = 1e-5};
  }

  static std::vector<Case<Shape>> cases() {
    using enum spec::DType;
    std::vector<Case<Shape>> c;
    c.push_back({{.T = 512, .d = 256, .V = 4096}, Size::quick});  // the trained model
    c.push_back({{.T = 1, .d = 256, .V = 4096}, Size::quick, false, CacheState::hot});
    c.push_back({{.T = 1, .d = 2048, .V = 102400}, Size::standard});  // V2-Lite
    c.push_back({{.T = 32, .d = 2048, .V = 102400}, Size::standard});
    c.push_back({{.T = 128, .d = 2048, .V = 102400}, Size::full});
    for (int64_t T : {1, 32, 512})  // an eighth of V3's vocabulary: 232 MB of weights
      c.push_back({{.T = T, .d = 7168, .V = 16160}, T < 512 ? Size::quick : Size::standard});
    c.push_back({{.T = 1, .d = 7168, .V = 129280}, Size::full});  // V3
    c.push_back({{.T = 32, .d = 7168, .V = 129280}, Size::full});
    c.push_back({{.T = 3, .d = 37, .V = 101}, Size::quick, true});
    c.push_back({{.T = 300, .d = 64, .V = 5001}, Size::quick, true});
    c.push_back({{.T = 5, .d = 40, .V = 1003, .dtype = f32}, Size::quick, true});
    c.push_back({{.T = 1, .d = 16, .V = 600001, .dtype = f32}, Size::quick, true});
    return c;
  }

  static std::vector<Impl<LmHeadCe>> impls() {
    std::vector<Impl<LmHeadCe>> v;
    v.push_back(
        {.how = "cpu_simd",
         .prepare =
             [](Data& d) {
               return Runner{.run = [a = d.args()] { kern::lm_head_ce_cpu_simd(a); },
                             .resolved_isa = kern::lm_head_ce_cpu_simd_isa(d.shape.dtype)};
             },
         .levels = {kern::Isa::avx2, kern::Isa::avx512, kern::Isa::avx512_bf16, kern::Isa::amx}});
    v.push_back(
        {.how = "cpu_packed",
         .prepare =
             [](Data& d) {
               const auto a = d.args();
               auto w = std::make_shared<kern::PackedMatrix>(kern::lm_head_pack(a));
               return Runner{.run = [a, w] { kern::lm_head_ce_cpu_packed(a, w->view()); },
                             .resolved_isa = kern::packed_isa(a.dtype, a.dtype)};
             },
         .levels = {kern::Isa::avx2, kern::Isa::avx512, kern::Isa::avx512_bf16, kern::Isa::amx}});
    v.push_back(cuda_impl<LmHeadCe>("cuda_mma", nullptr, [](Data& d, CudaMirror& m) {
      auto a = d.args();
      m.map(a.h, a.w, a.labels, a.nll, a.lse, a.argmax);
      void* scratch = m.scratch(kern::lm_head_ce_cuda_scratch_bytes(a));
      return [=](kern::CudaStream stream) { kern::lm_head_ce_cuda_mma(a, scratch, stream); };
    }));
    v.push_back(cuda_impl<LmHeadCe>(
        "cuda_cublaslt",
        [](const Shape& s) {
          spec::LmHeadCeArgs a{};
          a.T = s.T, a.d = s.d, a.V = s.V, a.dtype = s.dtype;
          return library_support(kern::lm_head_cublaslt_refuses(a));
        },
        [](Data& d, CudaMirror& m) {
          auto a = d.args();
          m.map(a.h, a.w, a.labels, a.nll, a.lse, a.argmax);
          const auto plan = std::make_shared<const kern::LmHeadCublasLtPlan>(a);
          void* library = m.scratch(kern::kCublasLtScratchBytes);
          void* scratch = m.scratch(kern::lm_head_ce_cuda_scratch_bytes(a));
          return [=](kern::CudaStream s) {
            kern::lm_head_ce_cuda_cublaslt(a, *plan, library, scratch, s);
          };
        },
        true, 80, true));
    // All logits by oneDNN, then the plain cross-entropy over them.
    v.push_back({"cpu_onednn", nullptr,
                 [](Data& d) {
                   auto z = std::make_shared<std::vector<float>>(size_t(d.shape.T * d.shape.V));
                   return Runner{
                       .run = [a = d.args(), z] { kern::lm_head_ce_cpu_onednn(a, z->data()); },
                       .resolved_isa = kern::gemm_onednn_isa()};
                 },
                 true});
    v.push_back({"cpu_eigen", [](const Shape& s) { return eigen_support(s.T, s.V, s.d); },
                 [](Data& d) {
                   auto h = std::make_shared<std::vector<float>>(d.h.numel());
                   auto w = std::make_shared<std::vector<float>>(d.w.numel());
                   for (int64_t i = 0; i < d.h.numel(); ++i) (*h)[size_t(i)] = float(d.h.get(i));
                   for (int64_t i = 0; i < d.w.numel(); ++i) (*w)[size_t(i)] = float(d.w.get(i));
                   return Runner{.run =
                                     [&d, h, w] {
                                       const auto a = d.args();
                                       ref::lm_head_ce<float>(a.T, a.d, a.V, h->data(), w->data(),
                                                              a.labels, a.nll, a.lse, a.argmax,
                                                              8192);
                                     },
                                 .resolved_isa = "baseline"};
                 },
                 true});
    return v;
  }
};

}  // namespace

std::unique_ptr<OpBase> make_lm_head_ce_op() { return make_op<LmHeadCe>(); }

}  // namespace v3b::bench
