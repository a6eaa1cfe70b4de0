// Block-scaled FP8 product: everything the suite knows about this op.
#include "reference/fp8_gemm.h"

#include <cmath>
#include <vector>

#include "bench/harness/cuda_mirror.h"
#include "bench/harness/op.h"
#include "bench/ops/gemm_common.h"
#include "bench/ops/registry.h"
#include "kernels/gemm/fp8.h"
#include "kernels/gemm/gemm.h"
#include "kernels/gemm/gemm_cuda.h"
#include "kernels/gemm/gemm_libs_cuda.h"
#include "kernels/gemm/packed_ops.h"
#include "reference/fp8_quant.h"
#include "reference/rmsnorm.h"

namespace v3b::bench {
namespace {

using spec::DType;
using spec::fp8_blocks;

struct Fp8Gemm {
  static constexpr const char* name = "fp8_gemm";
  static constexpr bool exact_fill = true;
  using Shape = spec::Fp8GemmShape;

  struct Data {
    Shape shape;
    Fill fill = Fill::real;
    HostTensor qa, sa, qb, sb, c;
    std::vector<HostTensor*> tensors() { return {&qa, &sa, &qb, &sb, &c}; }
    spec::Fp8GemmArgs args() {
      return {shape.m,        shape.n,
              shape.k,        qa.as<spec::f8e4m3>(),
              sa.as<float>(), qb.as<spec::f8e4m3>(),
              sb.as<float>(), shape.dtype,
              c.data()};
    }
  };

  // Codes as quantised normal values have them (largest near 448); scales spread over a factor
  // of 8. For the exact fill, integers and powers of two.
  static std::unique_ptr<Data> make(const Shape& s, Fill fill, uint64_t seed) {
    auto d = std::make_unique<Data>();
    d->shape = s;
    d->fill = fill;
    d->qa = HostTensor("qa", Role::input, DType::f8e4m3, {s.m, s.k});
    d->qb = HostTensor("qb", Role::input, DType::f8e4m3, {s.n, s.k});
    d->sa = HostTensor("sa", Role::input, DType::f32, {s.m, fp8_blocks(s.k)});
    d->sb = HostTensor("sb", Role::input, DType::f32, {fp8_blocks(s.n), fp8_blocks(s.k)});
    d->c = HostTensor("c", Role::output, s.dtype, {s.m, s.n});
    if (fill == Fill::exact) {
      d->qa.fill_exact(seed);
      d->qb.fill_exact(seed + 1);
    } else {
      d->qa.fill_real(seed, 150.0, false);
      d->qb.fill_real(seed + 1, 110.0, false);
    }
    d->sa.fill_real(seed + 2, 1.0, false);
    d->sb.fill_real(seed + 3, 1.0, false);
    const auto shape_scales = [&](HostTensor& t, bool pow2, float unit) {
      for (float* p = t.as<float>(); p != t.as<float>() + t.numel(); ++p) {
        const float e = std::min(1.5F, std::max(-1.5F, *p));
        *p = unit * std::exp2(pow2 ? std::round(e) : e);
      }
    };
    const bool exact = fill == Fill::exact;
    shape_scales(d->sa, exact || s.act_scale == spec::ActScale::ue8m0, exact ? 1.0F : 0x1p-7F);
    shape_scales(d->sb, exact, exact ? 1.0F : 1e-4F);
    return d;
  }

  static Expected reference(const Data& d) {
    const Shape& s = d.shape;
    // The columns judged, as a product of their own: rows of qb gathered, each with its row block's
    // scales.
    const auto columns = judged_columns(s.m, s.n, s.k);
    const int64_t kb = fp8_blocks(s.k);
    std::vector<double> c(size_t(s.m * s.n), 0.0), part;
    std::vector<spec::f8e4m3> rows;
    for (size_t j0 = 0; j0 < columns.size();) {
      size_t j1 = j0;  // columns of one 128-block at a time
      while (j1 < columns.size() && columns[j1] / 128 == columns[j0] / 128) ++j1;
      const auto n = int64_t(j1 - j0);
      rows.resize(size_t(n * s.k));
      part.assign(size_t(s.m * n), 0.0);
      for (int64_t j = 0; j < n; ++j)
        std::copy_n(d.qb.as<spec::f8e4m3>() + columns[j0 + size_t(j)] * s.k, s.k,
                    rows.data() + j * s.k);
      ref::fp8_gemm<double>(s.m, n, s.k, d.qa.as<spec::f8e4m3>(), d.sa.as<float>(), rows.data(),
                            d.sb.as<float>() + columns[j0] / 128 * kb, part.data());
      for (int64_t i = 0; i < s.m; ++i)
        for (int64_t j = 0; j < n; ++j) {
          const double v = part[size_t(i * n + j)];
          c[size_t(i * s.n + columns[j0 + size_t(j)])] =
              d.fill == Fill::exact ? ref::round_to(v, s.dtype) : v;
        }
      j0 = j1;
    }
    Expected e;
    e.tensors.push_back(
        {.name = "c", .values = std::move(c), .skip = skip_but_columns(s.m, s.n, columns)});
    return e;
  }

  static Cost cost(const Shape& s) {
    const double m = double(s.m), n = double(s.n), k = double(s.k), kb = double(fp8_blocks(s.k));
    return {2 * m * n * k,
            m * k + n * k + 4 * m * kb + 4 * double(fp8_blocks(s.n)) * kb +
                double(spec::dtype_bytes(s.dtype)) * m * n,
            "bf16", double(spec::dtype_bytes(s.dtype)) * m * n};
  }

  static Tolerance tolerance(const Shape& s, Fill fill, const std::string&) {
    return product_tolerance(fill, s.k, s.dtype);  // on the dequantised operands, fp32 accumulators
  }

  static std::vector<Case<Shape>> cases() {
    using enum spec::DType;
    std::vector<Case<Shape>> c;
    const auto add = [&](int64_t m, int64_t n, int64_t k, Size size, DType out = bf16) {
      c.push_back({{.m = m, .n = n, .k = k, .dtype = out}, size});
    };
    add(1, 7168, 2048, Size::quick);
    add(32, 7168, 2048, Size::quick);
    add(128, 7168, 2048, Size::quick);
    const int64_t v3[][2] = {{2112, 7168},  {576, 7168},  {24576, 1536}, {32768, 512},
                             {7168, 16384}, {4096, 7168}, {7168, 2048}};
    for (const int64_t m : {1, 8, 32, 128, 512})
      for (const auto& s : v3) {
        const bool have = s[0] == 7168 && s[1] == 2048 && (m == 1 || m == 32 || m == 128);
        if (!have)
          add(m, s[0], s[1],
              ((m == 1 || m == 128) && s[0] * s[1] < 40000000) || (s[0] == 7168 && s[1] == 2048)
                  ? Size::standard
                  : Size::full);
      }
    const int64_t v2_lite[][2] = {{3072, 2048}, {2816, 2048}, {2048, 1408}};
    for (const int64_t m : {1, 128})
      for (const auto& s : v2_lite) add(m, s[0], s[1], Size::full);
    add(512, 4096, 7168, Size::full, f32);
    c.push_back({{.m = 128, .n = 4096, .k = 7168, .act_scale = spec::ActScale::ue8m0}, Size::full});
    for (const auto& s : {std::array<int64_t, 3>{1, 1, 1},
                          {5, 64, 256},
                          {12, 63, 200},
                          {13, 200, 129},
                          {25, 65, 130},
                          {130, 192, 77},
                          {400, 70, 260},
                          {37, 576, 512}})
      for (const DType out : {bf16, f32})
        c.push_back({{.m = s[0], .n = s[1], .k = s[2], .dtype = out}, Size::quick, true});
    return c;
  }

  static spec::Fp8GemmArgs on_device(Data& d, CudaMirror& m) {
    auto a = d.args();
    m.map(a.qa, a.sa, a.qb, a.sb, a.c);
    return a;
  }
  static Support cutlass_form(const Shape& s) {
    if (const Support here = sm90a_support(); here.state != Support::State::yes) return here;
    if (s.dtype != DType::bf16 || s.m % 4 != 0 || s.k % 128 != 0 || s.n % 8 != 0)
      return {Support::State::unsupported,
              "the CUTLASS form takes C bf16, m a multiple of 4, k of 128, n of 8"};
    return {};
  }
  // Hopper only: see kernels/gemm/fp8_gemm.cuda_cublaslt.cpp.
  static Support cublaslt_form(const Shape& s) {
    if (kern::cuda_device().cc != 90)
      return {Support::State::unsupported,
              "cuBLASLt has 1x128 by 128x128 scales on compute capability 9.0 only"};
    return library_support(kern::cublaslt_refuses(
        spec::Fp8GemmArgs{s.m, s.n, s.k, nullptr, nullptr, nullptr, nullptr, s.dtype, nullptr}));
  }

  static std::vector<Impl<Fp8Gemm>> impls() {
    std::vector<Impl<Fp8Gemm>> v;
    v.push_back({"cpu_simd",
                 nullptr,
                 [](Data& d) {
                   return Runner{.run = [a = d.args()] { kern::fp8_gemm(a); },
                                 .resolved_isa = kern::fp8_gemm_isa(d.args())};
                 },
                 false,
                 {kern::Isa::avx2, kern::Isa::avx512, kern::Isa::avx512_bf16, kern::Isa::amx}});
    v.push_back({"cpu_packed",
                 nullptr,
                 [](Data& d) {
                   const auto a = d.args();
                   auto w = std::make_shared<kern::PackedMatrix>(kern::fp8_gemm_pack(a));
                   return Runner{.run = [a, w] { kern::fp8_gemm_cpu_packed(a, w->view()); },
                                 .resolved_isa = kern::packed_isa(DType::f8e4m3, DType::f8e4m3)};
                 },
                 false,
                 {kern::Isa::avx2, kern::Isa::avx512, kern::Isa::avx512_bf16, kern::Isa::amx}});
    v.push_back(cuda_impl<Fp8Gemm>(
        "cuda_mma",
        [](const Shape& s) {
          return cuda_emulation_limit(2 * double(std::max<int64_t>(s.m, 16)) * double(s.n) *
                                      double(s.k));
        },
        [](Data& d, CudaMirror& m) {
          return [a = on_device(d, m)](kern::CudaStream s) { kern::fp8_gemm_cuda_mma(a, s); };
        },
        false, 89));
    // Our choice of tiles and schedule out of NVIDIA's templates, compiled in: listed as ours, its main loop is theirs.
    v.push_back(cuda_impl<Fp8Gemm>(
        "cuda_cutlass_sm90", cutlass_form,
        [](Data& d, CudaMirror& m) {
          const auto a = on_device(d, m);
          void* scratch = m.scratch(kern::fp8_gemm_cutlass_sm90_scratch_bytes(a));
          return [=](kern::CudaStream s) { kern::fp8_gemm_cuda_cutlass_sm90(a, scratch, s); };
        },
        false, 90, true));
    v.push_back(cuda_impl<Fp8Gemm>(
        "cuda_cublaslt", cublaslt_form,
        [](Data& d, CudaMirror& m) {
          const auto a = on_device(d, m);
          const std::shared_ptr<kern::CublasLtPlan> plan(kern::cublaslt_plan(a),
                                                         kern::cublaslt_free);
          void* scratch = m.scratch(kern::fp8_gemm_cublaslt_scratch_bytes(a));
          return [=](kern::CudaStream s) { kern::fp8_gemm_cuda_cublaslt(a, *plan, scratch, s); };
        },
        true, 90, true));
    for (auto& i : v)
      if (i.how == "cuda_cutlass_sm90" || i.how == "cuda_cublaslt")
        i.tolerance = [](const Shape&, Fill fill, const std::string&) {
          return hopper_fp8_tolerance(fill);
        };
    // oneDNN 3.2 has no FP8: the weights become fp32 beforehand (4 bytes instead of 1), the
    // activations in the run.
    v.push_back({"cpu_onednn", nullptr,
                 [](Data& d) {
                   const Shape& s = d.shape;
                   auto w = std::make_shared<std::vector<float>>(size_t(s.n * s.k));
                   auto x = std::make_shared<std::vector<float>>(size_t(s.m * s.k));
                   kern::fp8_dequant_weight(s.n, s.k, d.qb.as<spec::f8e4m3>(), d.sb.as<float>(),
                                            DType::f32, w->data());
                   return Runner{.run = [a = d.args(), w,
                                         x] { kern::fp8_gemm_cpu_onednn(a, w->data(), x->data()); },
                                 .resolved_isa = kern::gemm_onednn_isa()};
                 },
                 true});
    v.push_back({"cpu_eigen", [](const Shape& s) { return eigen_support(s.m, s.n, s.k); },
                 [](Data& d) {
                   auto c = std::make_shared<std::vector<float>>(d.c.numel());
                   return Runner{.run =
                                     [&d, c] {
                                       const auto a = d.args();
                                       ref::fp8_gemm<float>(a.m, a.n, a.k, a.qa, a.sa, a.qb, a.sb,
                                                            c->data());
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

std::unique_ptr<OpBase> make_fp8_gemm_op() { return make_op<Fp8Gemm>(); }

}  // namespace v3b::bench
