// The cuBLASLt and cuBLAS forms on the emulation, with a stand-in for the libraries (tests/fake/cublas.cpp): transpositions,
// strides, scale layouts, padded rows, groups and pointer tables as NVIDIA's manual has them. Says nothing about the
// libraries themselves. Built where their headers are.
#include <gtest/gtest.h>

#include <array>
#include <cmath>
#include <cstdlib>
#include <random>
#include <string>
#include <vector>

#include "kernels/gemm/gemm_libs_cuda.h"
#include "kernels/gemm/mla_absorb.h"
#include "kernels/gemm/rows_cuda.h"
#include "kernels/moe/moe_experts_cuda.h"
#include "kernels/moe/moe_libs_cuda.h"
#include "model/error.h"
#include "reference/fp8_gemm.h"
#include "reference/gemm.h"
#include "reference/spec/fp8_quant.h"
#include "tests/cuda_emulated.h"

namespace v3b::kern {
namespace {

using spec::DType;
using v3b::testing::device;
using v3b::testing::host;
const bool kFake = [] { return setenv("V3BENCH_CUBLAS", V3B_FAKE_CUBLAS, 1) == 0; }();

struct Random {
  std::mt19937 r{7};
  int whole() { return int(r() % 9) - 4; }
  double normal(double s) { return std::normal_distribution<double>(0, s)(r); }
};
// Values of a type as bytes, as doubles.
struct Values {
  std::vector<double> v;
  std::vector<uint8_t> bytes;
};
Values make(size_t n, DType t, Random& r, double scale) {  // scale 0: integers
  Values x;
  x.bytes.resize(n * size_t(spec::dtype_bytes(t)));
  for (size_t i = 0; i < n; ++i) {
    const float f = scale == 0 ? float(r.whole()) : float(r.normal(scale));
    if (t == DType::bf16) {
      const auto b = spec::to_bf16(f);
      reinterpret_cast<spec::bf16*>(x.bytes.data())[i] = b;
      x.v.push_back(spec::to_float(b));
    } else {
      reinterpret_cast<float*>(x.bytes.data())[i] = f;
      x.v.push_back(f);
    }
  }
  return x;
}
std::vector<double> values_of(const DeviceBuffer& b, DType t) {
  std::vector<double> v;
  if (t == DType::bf16)
    for (const auto x : host<spec::bf16>(b)) v.push_back(spec::to_float(x));
  else
    for (const float x : host<float>(b)) v.push_back(x);
  return v;
}
double error(const std::vector<double>& got, const std::vector<double>& want) {
  double e = 0, n = 0;
  for (size_t i = 0; i < want.size(); ++i) {
    e += (got[i] - want[i]) * (got[i] - want[i]);
    n += want[i] * want[i];
  }
  return std::sqrt(e / n);
}

TEST(CudaLibraries, Gemm) {
  ASSERT_EQ(cublaslt_missing(), "");
  for (const auto& s : {std::array<int64_t, 3>{1, 1, 1}, {3, 5, 7}, {17, 33, 40}})
    for (const bool ta : {false, true})
      for (const bool tb : {false, true})
        for (const auto in : {DType::bf16, DType::f32})
          for (const bool accumulate : {false, true}) {
            Random r;
            const int64_t pad = 3, lda = (ta ? s[0] : s[2]) + pad, ldb = (tb ? s[2] : s[1]) + pad,
                          ldc = s[1] + pad;
            const Values a = make(size_t((ta ? s[2] : s[0]) * lda), in, r, 0),
                         b = make(size_t((tb ? s[1] : s[2]) * ldb), in, r, 0),
                         c = make(size_t(s[0] * ldc), DType::f32, r, 0);
            std::vector<double> want = c.v;
            ref::gemm<double>(s[0], s[1], s[2], a.v.data(), lda, ta, b.v.data(), ldb, tb,
                              want.data(), ldc, accumulate);
            const DeviceBuffer da = device(a.bytes), db = device(b.bytes), dc = device(c.bytes);
            DeviceBuffer scratch(kCublasLtScratchBytes);
            const GemmArgs g = {s[0], s[1], s[2],      da.data(), lda, ta,         db.data(),
                                ldb,  tb,   dc.data(), ldc,       in,  DType::f32, accumulate};
            EXPECT_EQ(cublaslt_refuses(g), "");
            const std::shared_ptr<CublasLtPlan> plan(cublaslt_plan(g), cublaslt_free);
            gemm_cuda_cublaslt(g, *plan, scratch.data(), cuda_stream());
            cuda_synchronize(cuda_stream());
            const auto got = values_of(dc, DType::f32);
            for (size_t i = 0; i < want.size(); ++i) ASSERT_EQ(got[i], want[i]) << i;  // pads too
          }
  GemmArgs refused{4, 4, 13};
  refused.lda = refused.ldb = 13, refused.ldc = 4;
  EXPECT_FALSE(cublaslt_refuses(refused).empty());
  EXPECT_THROW(cublaslt_plan(refused), Error);
}

TEST(CudaLibraries, Fp8BlockScales) {
  for (const auto& s : {std::array<int64_t, 3>{1, 16, 16},
                        {5, 144, 208},
                        {12, 272, 640},
                        {130, 128, 512},
                        {7, 400, 1296}})
    for (const auto out : {DType::f32, DType::bf16}) {
      SCOPED_TRACE(std::to_string(s[0]) + "x" + std::to_string(s[1]) + "x" + std::to_string(s[2]));
      Random r;
      const int64_t m = s[0], n = s[1], k = s[2], kb = spec::fp8_blocks(k),
                    nb = spec::fp8_blocks(n);
      const auto codes = [&](int64_t count) {
        std::vector<spec::f8e4m3> c;
        for (int64_t i = 0; i < count; ++i) c.push_back(spec::to_f8e4m3(float(r.whole())));
        return c;
      };
      const auto scales = [&](int64_t count) {
        std::vector<float> c;
        for (int64_t i = 0; i < count; ++i) c.push_back(std::exp2(float(r.whole() % 2)));
        return c;
      };
      const auto qa = codes(m * k), qb = codes(n * k);
      const auto sa = scales(m * kb), sb = scales(nb * kb);
      std::vector<double> want(size_t(m * n));
      ref::fp8_gemm<double>(m, n, k, qa.data(), sa.data(), qb.data(), sb.data(), want.data());
      const DeviceBuffer da = device(qa), dsa = device(sa), db = device(qb), dsb = device(sb);
      DeviceBuffer c(m * n * spec::dtype_bytes(out));
      const spec::Fp8GemmArgs a = {m,
                                   n,
                                   k,
                                   da.as<spec::f8e4m3>(),
                                   dsa.as<float>(),
                                   db.as<spec::f8e4m3>(),
                                   dsb.as<float>(),
                                   out,
                                   c.data()};
      ASSERT_EQ(cublaslt_refuses(a), "");
      DeviceBuffer scratch(fp8_gemm_cublaslt_scratch_bytes(a));
      const std::shared_ptr<CublasLtPlan> plan(cublaslt_plan(a), cublaslt_free);
      fp8_gemm_cuda_cublaslt(a, *plan, scratch.data(), cuda_stream());
      cuda_synchronize(cuda_stream());
      const auto got = values_of(c, out);
      for (size_t i = 0; i < want.size(); ++i)
        ASSERT_EQ(got[i], out == DType::f32 ? want[i]
                                            : double(spec::to_float(spec::to_bf16(float(want[i])))))
            << i;
    }
  EXPECT_FALSE(cublaslt_refuses(spec::Fp8GemmArgs{4, 20, 128}).empty());
}

TEST(CudaLibraries, AbsorbedProjections) {
  for (const auto type : {DType::bf16, DType::f32}) {
    Random r;
    const int64_t T = 5, n_h = 3, n = 12, k = 20;
    const Values x = make(size_t(T * n_h * k), type, r, 0),
                 w = make(size_t(n_h * n * k), type, r, 0);
    std::vector<double> want(size_t(T * n_h * n));
    for (int64_t h = 0; h < n_h; ++h)
      ref::gemm<double>(T, n, k, x.v.data() + h * k, n_h * k, false, w.v.data() + h * n * k, k,
                        true, want.data() + h * n, n_h * n);
    const DeviceBuffer dx = device(x.bytes), dw = device(w.bytes);
    DeviceBuffer y(T * n_h * n * spec::dtype_bytes(type)), scratch(kCublasLtScratchBytes);
    const spec::MlaAbsorbArgs a = {T, n_h, n, k, type, dx.data(), dw.data(), y.data()};
    ASSERT_EQ(cublaslt_refuses(a), "");
    const std::shared_ptr<CublasLtPlan> plan(cublaslt_plan(a), cublaslt_free);
    mla_absorb_cuda_cublaslt(a, *plan, scratch.data(), cuda_stream());
    cuda_synchronize(cuda_stream());
    const auto got = values_of(y, type);
    for (size_t i = 0; i < want.size(); ++i)
      ASSERT_EQ(got[i], type == DType::f32 ? want[i]
                                           : double(spec::to_float(spec::to_bf16(float(want[i])))));
  }
}

TEST(CudaLibraries, LmHead) {
  for (const int64_t T : {1, 2050})
    for (const int64_t V : {100, 4100}) {
      Random r;
      const int64_t d = 16;
      const Values h = make(size_t(T * d), DType::bf16, r, 1),
                   w = make(size_t(V * d), DType::bf16, r, 1);
      std::vector<int64_t> labels;
      for (int64_t t = 0; t < T; ++t)
        labels.push_back(t % 7 == 3 ? spec::kIgnoreLabel : t * 13 % V);
      const DeviceBuffer dh = device(h.bytes), dw = device(w.bytes), dl = device(labels);
      const size_t n = size_t(T);
      DeviceBuffer out[2][3];
      for (int i = 0; i < 2; ++i) {
        for (DeviceBuffer& b : out[i]) b = DeviceBuffer(T * 4);
        const spec::LmHeadCeArgs a = {T,
                                      d,
                                      V,
                                      DType::bf16,
                                      dh.data(),
                                      dw.data(),
                                      dl.as<int64_t>(),
                                      out[i][0].as<float>(),
                                      out[i][1].as<float>(),
                                      out[i][2].as<int32_t>()};
        DeviceBuffer scratch(lm_head_ce_cuda_scratch_bytes(a)), library(kCublasLtScratchBytes);
        if (i == 0) {
          lm_head_ce_cuda_mma(a, scratch.data(), cuda_stream());
        } else {
          ASSERT_EQ(lm_head_cublaslt_refuses(a), "");
          lm_head_ce_cuda_cublaslt(a, LmHeadCublasLtPlan(a), library.data(), scratch.data(),
                                   cuda_stream());
        }
        cuda_synchronize(cuda_stream());
      }
      for (int o = 0; o < 2; ++o) {
        const auto x = host<float>(out[0][o]), y = host<float>(out[1][o]);
        for (size_t i = 0; i < n; ++i)
          ASSERT_TRUE(std::abs(x[i] - y[i]) <= 1e-5F * (1 + std::abs(x[i]))) << x[i] << " " << y[i];
      }
      EXPECT_EQ(host<int32_t>(out[0][2]), host<int32_t>(out[1][2]));
    }
}

TEST(CudaLibraries, MoeGrouped) {
  ASSERT_EQ(moe_cublas_missing(), "");
  for (const auto type : {DType::bf16, DType::f32})
    for (const int64_t shared_m : {0, 24}) {
      Random r;
      const int64_t T = 9, d = 40, m = 16, E = 6, K = 2, e = spec::dtype_bytes(type);
      const Values x = make(size_t(T * d), type, r, 1);
      std::vector<int32_t> idx;
      std::vector<float> weight;
      for (int64_t i = 0; i < T * K; ++i) {
        idx.push_back(i == 5 ? -1 : int32_t((i / K * 2 + i % K * 3) % 5));  // expert 5: nobody
        weight.push_back(float(0.2 + 0.1 * double(i % 4)));
      }
      const DeviceBuffer dx = device(x.bytes), didx = device(idx), dweight = device(weight);
      std::vector<DeviceBuffer> keep;
      const auto bank = [&](int64_t width) {
        spec::FfnPointers f{};
        for (const void** p : {&f.gate, &f.up, &f.down}) {
          keep.push_back(device(make(size_t(width * d), type, r, 0.3).bytes));
          *p = keep.back().data();
        }
        return f;
      };
      std::vector<spec::FfnPointers> experts;
      for (int64_t i = 0; i < E; ++i) experts.push_back(bank(m));
      const spec::FfnPointers shared = shared_m > 0 ? bank(shared_m) : spec::FfnPointers{};
      const DeviceBuffer table = device(experts);
      DeviceBuffer y[2] = {DeviceBuffer(T * d * e), DeviceBuffer(T * d * e)};
      spec::MoeExpertsArgs a{T,
                             d,
                             m,
                             E,
                             K,
                             shared_m,
                             type,
                             type,
                             dx.data(),
                             didx.as<int32_t>(),
                             dweight.as<float>(),
                             table.as<spec::FfnPointers>(),
                             shared,
                             y[0].data()};
      DeviceBuffer ours(moe_experts_cuda_scratch_bytes(a));
      moe_experts_cuda_simt(a, ours.data(), cuda_stream());
      a.experts = experts.data(), a.y = y[1].data();
      DeviceBuffer scratch(moe_experts_cublas_scratch_bytes(a));
      const std::shared_ptr<MoeCublasPlan> plan(
          moe_cublas_plan(a, idx.data(), scratch.data(), cuda_stream()), moe_cublas_free);
      for (int i = 0; i < 2; ++i)
        moe_experts_cuda_cublas(*plan, cuda_stream());  // as often as wanted
      cuda_synchronize(cuda_stream());
      const double err = error(values_of(y[1], type), values_of(y[0], type));
      EXPECT_TRUE(err <= (type == DType::bf16 ? 6e-3 : 1e-6)) << err;
      EXPECT_TRUE(type == DType::f32 || err > 0) << "bf16 rounds between the steps";
    }
}

}  // namespace
}  // namespace v3b::kern
