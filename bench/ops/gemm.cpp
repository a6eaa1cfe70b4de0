// Dense products: everything the suite knows about this op.
#include "kernels/gemm/gemm.h"

#include <cstring>
#include <vector>

#include "bench/harness/cuda_mirror.h"
#include "bench/harness/op.h"
#include "bench/ops/gemm_common.h"
#include "bench/ops/registry.h"
#include "kernels/gemm/gemm_cuda.h"
#include "kernels/gemm/gemm_libs_cuda.h"
#include "kernels/gemm/packed_ops.h"
#include "reference/gemm.h"
#include "reference/rmsnorm.h"
#include "reference/spec/gemm.h"

namespace v3b::bench {
namespace {

using spec::DType;

struct Gemm {
  static constexpr const char* name = "gemm";
  static constexpr bool exact_fill = true;
  using Shape = spec::GemmShape;

  static kern::GemmArgs problem(const Shape& s) {  // without pointers
    return {s.m,
            s.n,
            s.k,
            nullptr,
            s.trans_a ? s.m : s.k,
            s.trans_a,
            nullptr,
            s.trans_b ? s.k : s.n,
            s.trans_b,
            nullptr,
            s.n,
            s.dtype,
            s.c_type,
            s.accumulate};
  }

  struct Data {
    Shape shape;
    Fill fill = Fill::real;
    HostTensor a, b, c_in, c;  // c_in: what an accumulating run starts from
    std::vector<HostTensor*> tensors() {
      return shape.accumulate ? std::vector<HostTensor*>{&a, &b, &c_in, &c}
                              : std::vector<HostTensor*>{&a, &b, &c};
    }
    kern::GemmArgs args() {
      kern::GemmArgs g = problem(shape);
      g.a = a.data(), g.b = b.data(), g.c = c.data();
      return g;
    }
  };

  static std::unique_ptr<Data> make(const Shape& s, Fill fill, uint64_t seed) {
    auto d = std::make_unique<Data>();
    d->shape = s;
    d->fill = fill;
    d->a = HostTensor("a", Role::input, s.dtype,
                      s.trans_a ? std::vector{s.k, s.m} : std::vector{s.m, s.k});
    d->b = HostTensor("b", Role::input, s.dtype,
                      s.trans_b ? std::vector{s.n, s.k} : std::vector{s.k, s.n});
    d->c = HostTensor("c", Role::output, s.c_type, {s.m, s.n});
    if (fill == Fill::exact) {
      d->a.fill_exact(seed);
      d->b.fill_exact(seed + 1);
    } else {
      d->a.fill_real(seed);
      d->b.fill_real(seed + 1, 1.0 / std::sqrt(double(std::max<int64_t>(s.k, 1))), false);
    }
    if (s.accumulate) {
      d->c_in = HostTensor("c_in", Role::input, s.c_type, {s.m, s.n});
      if (fill == Fill::exact) {
        d->c_in.fill_exact(seed + 2);
      } else {
        d->c_in.fill_real(seed + 2, 1.0, false);
      }
    }
    return d;
  }

  // An accumulating run starts by restoring C: part of the timed work of every implementation
  // alike.
  static void restore(Data& d) {
    if (d.shape.accumulate) std::memcpy(d.c.data(), d.c_in.data(), size_t(d.c.bytes()));
  }

  static Expected reference(const Data& d) {
    const Shape& s = d.shape;
    const auto columns = judged_columns(s.m, s.n, s.k);
    const int64_t nc = int64_t(columns.size());
    const std::vector<double> a = d.a.to_doubles();
    std::vector<double> b(size_t(nc * s.k)), part(size_t(s.m * nc));
    for (int64_t j = 0; j < nc; ++j)  // the judged rows of B as [nc, k]
      for (int64_t k = 0; k < s.k; ++k)
        b[size_t(j * s.k + k)] =
            d.b.get(s.trans_b ? columns[size_t(j)] * s.k + k : k * s.n + columns[size_t(j)]);
    if (s.accumulate)
      for (int64_t i = 0; i < s.m; ++i)
        for (int64_t j = 0; j < nc; ++j)
          part[size_t(i * nc + j)] = d.c_in.get(i * s.n + columns[size_t(j)]);
    ref::gemm<double>(s.m, nc, s.k, a.data(), s.trans_a ? s.m : s.k, s.trans_a, b.data(), s.k, true,
                      part.data(), nc, s.accumulate);
    std::vector<double> c(size_t(s.m * s.n), 0.0);
    for (int64_t i = 0; i < s.m; ++i)
      for (int64_t j = 0; j < nc; ++j) {
        const double v = part[size_t(i * nc + j)];
        c[size_t(i * s.n + columns[size_t(j)])] =
            d.fill == Fill::exact ? ref::round_to(v, s.c_type) : v;
      }
    Expected e;
    e.tensors.push_back(
        {.name = "c", .values = std::move(c), .skip = skip_but_columns(s.m, s.n, columns)});
    return e;
  }

  static Cost cost(const Shape& s) {
    const double m = double(s.m), n = double(s.n), k = double(s.k);
    const double in = double(spec::dtype_bytes(s.dtype)), out = double(spec::dtype_bytes(s.c_type));
    return {2 * m * n * k, (m * k + n * k) * in + m * n * out * (s.accumulate ? 3 : 1),
            s.dtype == DType::bf16 ? "bf16" : "f32", m * n * out};
  }

  static Tolerance tolerance(const Shape& s, Fill fill, const std::string&) {
    return product_tolerance(fill, s.k, s.c_type);
  }

  static std::vector<Case<Shape>> cases() {
    using enum spec::DType;
    std::vector<Case<Shape>> c;
    const auto linear = [&](int64_t m, int64_t n, int64_t k, Size size, DType out = bf16,
                            DType in = bf16) {
      c.push_back({{.m = m, .n = n, .k = k, .c_type = out, .dtype = in}, size});
    };
    linear(1, 7168, 2048, Size::quick);
    linear(128, 7168, 2048, Size::quick);
    linear(2048, 256, 384, Size::quick, f32);  // the trained model
    linear(128, 80, 256, Size::quick, f32);    // one of its experts
    c.push_back({{.m = 256, .n = 384, .k = 2048, .trans_a = true, .trans_b = false},
                 Size::quick});                    // gradient
    linear(2048, 4096, 256, Size::standard, f32);  // its head
    c.push_back(
        {{.m = 4096, .n = 256, .k = 2048, .trans_a = true, .trans_b = false}, Size::standard});
    c.push_back({{.m = 2048, .n = 256, .k = 4096, .trans_b = false}, Size::standard});
    const int64_t v2_lite[][2] = {{3072, 2048}, {576, 2048},  {4096, 512},  {2048, 2048},
                                  {2816, 2048}, {2048, 1408}, {10944, 2048}};
    const int64_t v3[][2] = {{2112, 7168},  {24576, 1536}, {32768, 512},
                             {7168, 16384}, {4096, 7168},  {7168, 2048}};
    for (const int64_t m : {1, 8, 32, 128, 512}) {
      const Size size = m == 1 || m == 128 ? Size::standard : Size::full;
      for (const auto& s : v2_lite) linear(m, s[0], s[1], size);
      for (const auto& s : v3)
        if (!(s[0] == 7168 && s[1] == 2048 && (m == 1 || m == 128)))
          linear(m, s[0], s[1],
                 s[0] == 7168 && s[1] == 2048          ? Size::standard  // all five row counts
                 : s[0] == 2112 && (m == 8 || m == 32) ? Size::standard
                                                       : Size::full);
      linear(m, 256, 7168, size, f32);  // gate
    }
    linear(1, 129280, 7168, Size::full, f32);  // head
    for (const int64_t m : {1, 128}) linear(m, 7168, 2048, Size::standard, f32, f32);
    linear(2048, 2048, 2048, Size::standard, f32, bf16);
    linear(2048, 2048, 2048, Size::standard, f32, f32);
    // odd little shapes
    for (const auto& s :
         {std::array<int64_t, 3>{1, 1, 1}, {3, 5, 7}, {13, 33, 129}, {137, 80, 77}, {65, 257, 96}})
      for (const bool ta : {false, true})
        for (const bool tb : {false, true})
          for (const DType in : {bf16, f32})
            c.push_back({{.m = s[0],
                          .n = s[1],
                          .k = s[2],
                          .trans_a = ta,
                          .trans_b = tb,
                          .c_type = in,
                          .dtype = in},
                         Size::quick,
                         true});
    c.push_back(
        {{.m = 100, .n = 96, .k = 200, .trans_a = true, .trans_b = false, .accumulate = true},
         Size::quick,
         true});
    c.push_back({{.m = 7, .n = 96, .k = 200, .accumulate = true, .dtype = f32}, Size::quick, true});
    return c;
  }

  // A CUDA form with the restoring copy in front; `make` turns GemmArgs with device pointers into the launch.
  template <class F>
  static CudaPrepare<Gemm> prepared(F make) {
    return [make](Data& d, CudaMirror& m) {
      auto g = d.args();
      const void* from = d.shape.accumulate ? d.c_in.data() : nullptr;
      m.map(g.a, g.b, g.c, from);
      const int64_t bytes = d.c.bytes();
      const std::function<void(kern::CudaStream)> launch = make(g, m);
      return [=](kern::CudaStream s) {
        if (from != nullptr) kern::cuda_copy(g.c, from, bytes, s);
        launch(s);
      };
    };
  }
  template <class F>
  static CudaPrepare<Gemm> on_device(F entry) {
    return prepared([entry](const kern::GemmArgs& g, CudaMirror&) {
      return [=](kern::CudaStream s) { entry(g, s); };
    });
  }
  // cuBLASLt and CUTLASS: the plan and the scratch are made beforehand.
  static std::function<void(kern::CudaStream)> cublaslt(const kern::GemmArgs& g, CudaMirror& m) {
    const std::shared_ptr<kern::CublasLtPlan> plan(kern::cublaslt_plan(g), kern::cublaslt_free);
    void* scratch = m.scratch(kern::kCublasLtScratchBytes);
    return [=](kern::CudaStream s) { kern::gemm_cuda_cublaslt(g, *plan, scratch, s); };
  }
  static std::function<void(kern::CudaStream)> cutlass(const kern::GemmArgs& g, CudaMirror& m) {
    void* scratch = m.scratch(kern::gemm_cutlass_sm90_scratch_bytes(g));
    return [=](kern::CudaStream s) { kern::gemm_cuda_cutlass_sm90(g, scratch, s); };
  }
  static Support cutlass_form(const Shape& s) {
    if (const Support here = sm90a_support(); here.state != Support::State::yes) return here;
    if (s.dtype != DType::bf16 || s.c_type != DType::bf16 || s.trans_a || !s.trans_b ||
        s.accumulate || s.n % 8 != 0 || s.k % 8 != 0)
      return {Support::State::unsupported,
              "the CUTLASS form takes bf16 with A [m,k], B [n,k], C bf16, n and k multiples of 8"};
    return {};
  }
  static Support forward_form(const Shape& s) {
    if (s.dtype != DType::bf16 || s.trans_a || !s.trans_b)
      return {Support::State::unsupported, "tensor cores take bf16 with A [m,k] and B [n,k] only"};
    return cuda_emulation_limit(2 * double(std::max<int64_t>(s.m, 16)) * double(s.n) * double(s.k));
  }

  static std::vector<Impl<Gemm>> impls() {
    std::vector<Impl<Gemm>> v;
    v.push_back(cuda_impl<Gemm>("cuda_mma", forward_form, on_device(kern::gemm_cuda_mma)));
    v.push_back(cuda_impl<Gemm>(
        "cuda_simt",
        [](const Shape& s) {
          return cuda_emulation_limit(2 * double(s.m) * double(s.n) * double(s.k));
        },
        on_device(kern::gemm_cuda_simt)));
    // Our choice of tiles and schedule out of NVIDIA's templates, compiled in: listed as ours, its main loop is theirs.
    v.push_back(
        cuda_impl<Gemm>("cuda_cutlass_sm90", cutlass_form, prepared(cutlass), false, 90, true));
    v.push_back(cuda_impl<Gemm>(
        "cuda_cublaslt",
        [](const Shape& s) { return library_support(kern::cublaslt_refuses(problem(s))); },
        prepared(cublaslt), true, 80, true));
    // What the model calls: dot products for few rows, tiles beyond.
    v.push_back({"cpu_simd",
                 nullptr,
                 [](Data& d) {
                   const kern::GemmArgs g = d.args();
                   return Runner{.run =
                                     [&d, g] {
                                       restore(d);
                                       kern::gemm(g);
                                     },
                                 .resolved_isa = kern::gemm_isa(g)};
                 },
                 false,
                 {kern::Isa::avx2, kern::Isa::avx512, kern::Isa::avx512_bf16, kern::Isa::amx}});
    // What the model calls where its weights are packed at load.
    v.push_back(
        {"cpu_packed",
         [](const Shape& s) -> Support {
           if (s.trans_a || !s.trans_b || s.accumulate)
             return {Support::State::unsupported, "a linear layer with a packed weight only"};
           return {};
         },
         [](Data& d) {
           const kern::GemmArgs g = d.args();
           auto w = std::make_shared<kern::PackedMatrix>(kern::gemm_pack(g));
           return Runner{.run = [g, w] { kern::gemm_cpu_packed(g, w->view()); },
                         .resolved_isa = kern::packed_isa(g.ab_type, g.ab_type)};
         },
         false,
         {kern::Isa::avx2, kern::Isa::avx512, kern::Isa::avx512_bf16, kern::Isa::amx}});
    v.push_back({"cpu_onednn", nullptr,
                 [](Data& d) {
                   return Runner{.run =
                                     [&d, g = d.args()] {
                                       restore(d);
                                       kern::gemm_onednn(g);
                                     },
                                 .resolved_isa = kern::gemm_onednn_isa()};
                 },
                 true});
    v.push_back(
        {"cpu_onednn_packed",
         [](const Shape& s) -> Support {
           if (s.trans_a || !s.trans_b || s.accumulate)
             return {Support::State::unsupported, "a linear layer with a packed weight only"};
           if (!kern::OnednnLinear::supported(s.dtype, s.c_type))
             return {Support::State::unsupported, "oneDNN has no such matmul here"};
           return {};
         },
         [](Data& d) {
           auto layer = std::make_shared<kern::OnednnLinear>(d.args());
           return Runner{.run = [layer] { layer->run(); }, .resolved_isa = kern::gemm_onednn_isa()};
         },
         true});
    v.push_back({"cpu_eigen", [](const Shape& s) { return eigen_support(s.m, s.n, s.k); },
                 [](Data& d) {
                   auto a = std::make_shared<std::vector<float>>(d.a.numel());
                   auto b = std::make_shared<std::vector<float>>(d.b.numel());
                   auto c = std::make_shared<std::vector<float>>(d.c.numel());
                   for (int64_t i = 0; i < d.a.numel(); ++i) (*a)[size_t(i)] = float(d.a.get(i));
                   for (int64_t i = 0; i < d.b.numel(); ++i) (*b)[size_t(i)] = float(d.b.get(i));
                   return Runner{.run =
                                     [&d, a, b, c] {
                                       const Shape& s = d.shape;
                                       if (s.accumulate)
                                         for (int64_t i = 0; i < d.c.numel(); ++i)
                                           (*c)[size_t(i)] = float(d.c_in.get(i));
                                       ref::gemm<float>(s.m, s.n, s.k, a->data(),
                                                        s.trans_a ? s.m : s.k, s.trans_a, b->data(),
                                                        s.trans_b ? s.k : s.n, s.trans_b, c->data(),
                                                        s.n, s.accumulate);
                                       for (int64_t i = 0; i < d.c.numel(); ++i)
                                         d.c.set(i, (*c)[size_t(i)]);
                                     },
                                 .resolved_isa = "baseline"};
                 },
                 true});
    return v;
  }
};

}  // namespace

std::unique_ptr<OpBase> make_gemm_op() { return make_op<Gemm>(); }

}  // namespace v3b::bench
