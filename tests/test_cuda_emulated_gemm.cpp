// Dense products of the CUDA backend on the emulation against float64: ragged tails, rows that are not 16-byte aligned,
// exact fills bit by bit, pad columns of C untouched.
#include <gtest/gtest.h>

#include <array>
#include <cmath>
#include <cstdlib>
#include <map>
#include <random>
#include <string>
#include <vector>

#include "bench/harness/op.h"
#include "bench/ops/registry.h"
#include "kernels/gemm/fp8_scales_cuda.h"
#include "kernels/gemm/gemm_cuda.h"
#include "kernels/gemm/gemm_libs_cuda.h"
#include "model/error.h"
#include "reference/fp8_gemm.h"
#include "reference/gemm.h"
#include "reference/spec/dtype.h"

namespace v3b::kern {
namespace {

const bool kEmulate = [] { return setenv("V3BENCH_CUDA", "emulate", 1) == 0; }();

// Host values of a device array: as bytes for the kernel, as doubles for the reference.
struct Array {
  std::vector<double> values;
  DeviceBuffer device;
};
void upload(Array& x, spec::DType t) {
  const size_t n = x.values.size();
  std::vector<uint8_t> bytes(n * size_t(spec::dtype_bytes(t)) + 16);
  for (size_t i = 0; i < n; ++i) {
    const float v = static_cast<float>(x.values[i]);
    if (t == spec::DType::bf16) {
      const spec::bf16 b = spec::to_bf16(v);
      x.values[i] = spec::to_float(b);
      reinterpret_cast<spec::bf16*>(bytes.data())[i] = b;
    } else if (t == spec::DType::f8e4m3) {
      const spec::f8e4m3 b = spec::to_f8e4m3(v);
      x.values[i] = spec::to_float(b);
      reinterpret_cast<spec::f8e4m3*>(bytes.data())[i] = b;
    } else {
      x.values[i] = v;
      reinterpret_cast<float*>(bytes.data())[i] = v;
    }
  }
  x.device = DeviceBuffer(int64_t(bytes.size()));
  cuda_upload(x.device.data(), bytes.data(), int64_t(bytes.size()), cuda_stream());
}
Array make(int64_t n, spec::DType t, bool exact, unsigned seed, double scale = 1) {
  std::mt19937 r(seed);
  Array x;
  x.values.resize(size_t(n));
  std::normal_distribution<double> normal(0, scale);
  for (double& v : x.values) v = exact ? double(int(r() % 9) - 4) : normal(r);
  upload(x, t);
  return x;
}
std::vector<double> download(const Array& x, spec::DType t) {
  std::vector<uint8_t> bytes(size_t(x.device.bytes()));
  cuda_download(bytes.data(), x.device.data(), x.device.bytes(), cuda_stream());
  std::vector<double> v(x.values.size());
  for (size_t i = 0; i < v.size(); ++i)
    v[i] = t == spec::DType::bf16 ? spec::to_float(reinterpret_cast<spec::bf16*>(bytes.data())[i])
                                  : reinterpret_cast<float*>(bytes.data())[i];
  return v;
}
// NaN fails.
void expect_close(const std::vector<double>& got, const std::vector<double>& want, bool exact,
                  double rel_fro) {
  double e = 0, n = 0;
  size_t wrong = 0;
  for (size_t i = 0; i < want.size(); ++i) {
    e += (got[i] - want[i]) * (got[i] - want[i]);
    n += want[i] * want[i];
    wrong += !(got[i] == want[i]);
  }
  if (exact)
    EXPECT_EQ(wrong, 0u) << "of " << want.size();
  else
    EXPECT_TRUE(std::sqrt(e) <= rel_fro * std::sqrt(n)) << std::sqrt(e / n);
}

struct Case {
  int64_t M, N, K;
  bool ta = false, tb = true;
  spec::DType in = spec::DType::bf16, out = spec::DType::f32;
  bool accumulate = false;
  int64_t pad = 0;  // of the leading dimensions
};
void check(const Case& c, bool exact) {
  SCOPED_TRACE(testing::Message() << c.M << "x" << c.N << "x" << c.K << " ta=" << c.ta
                                  << " tb=" << c.tb << " in=" << int(c.in) << " out=" << int(c.out)
                                  << " acc=" << c.accumulate << " pad=" << c.pad
                                  << " exact=" << exact);
  const int64_t lda = (c.ta ? c.M : c.K) + c.pad, ldb = (c.tb ? c.K : c.N) + c.pad,
                ldc = c.N + c.pad;
  Array a = make((c.ta ? c.K : c.M) * lda, c.in, exact, 1);
  Array b = make((c.tb ? c.N : c.K) * ldb, c.in, exact, 2, 1 / std::sqrt(double(c.K)));
  Array out = make(c.M * ldc, c.out, exact, 3);
  std::vector<double> want = out.values;
  ref::gemm<double>(c.M, c.N, c.K, a.values.data(), lda, c.ta, b.values.data(), ldb, c.tb,
                    want.data(), ldc, c.accumulate);
  if (exact && c.out == spec::DType::bf16)
    for (double& v : want) v = spec::to_float(spec::to_bf16(float(v)));
  GemmArgs g;
  g.M = c.M, g.N = c.N, g.K = c.K, g.a = a.device.data(), g.lda = lda, g.trans_a = c.ta;
  g.b = b.device.data(), g.ldb = ldb, g.trans_b = c.tb, g.c = out.device.data(), g.ldc = ldc;
  g.ab_type = c.in, g.c_type = c.out, g.accumulate = c.accumulate;
  gemm_cuda_mma(g, cuda_stream());
  cuda_synchronize(cuda_stream());
  const auto got = download(out, c.out);
  expect_close(got, want, exact, c.out == spec::DType::bf16 ? 3e-3 : 1e-5);
  for (int64_t i = 0; i < c.M; ++i)  // pad columns
    for (int64_t j = c.N; j < ldc; ++j)
      ASSERT_EQ(got[size_t(i * ldc + j)], out.values[size_t(i * ldc + j)]);
}

TEST(CudaGemm, TensorCores) {
  using enum spec::DType;
  const std::vector<Case> cases = {
      {1, 1, 1},
      {1, 64, 512},
      {3, 5, 7},
      {13, 33, 129},
      {16, 40, 260, false, true, bf16, bf16, false, 8},
      {16, 40, 260, false, true, bf16, f32, true, 3},
      {29, 70, 384},
      {32, 32, 1000, false, true, bf16, bf16},
      {65, 257, 96},
      {137, 80, 77, false, true, bf16, bf16},
      {100, 48, 1100},
      {128, 128, 32},
      {70, 130, 200, false, true, bf16, f32, true},
      {70, 131, 203, false, true, bf16, bf16, true, 5},
      {1700, 1930, 40},  // 128x128 tiles, ragged in every direction
      {1700, 1930, 72, false, true, bf16, bf16},
  };
  for (const Case& c : cases)
    for (const bool exact : {true, false})
      if (c.M < 1000 || exact == (c.K == 40)) check(c, exact);
}
TEST(CudaGemm, NoTensorCores) {
  using enum spec::DType;
  for (const auto& s : {std::array<int64_t, 3>{1, 1, 1}, {3, 5, 7}, {13, 33, 129}, {137, 80, 77}})
    for (const bool ta : {false, true})
      for (const bool tb : {false, true})
        for (const auto t : {bf16, f32}) {
          if (t == bf16 && !ta && tb) continue;
          for (const bool exact : {true, false})
            check({s[0], s[1], s[2], ta, tb, t, t, exact, exact ? 0 : 3}, exact);
        }
}
TEST(CudaGemm, Batched) {
  const int64_t count = 3, M = 5, N = 24, K = 40;
  Array a = make(count * M * K, spec::DType::bf16, true, 1),
        b = make(count * N * K, spec::DType::bf16, true, 2),
        c = make(count * M * N, spec::DType::f32, true, 3);
  std::vector<double> want(c.values.size());
  for (int64_t i = 0; i < count; ++i)
    ref::gemm<double>(M, N, K, a.values.data() + i * M * K, K, false, b.values.data() + i * N * K,
                      K, true, want.data() + i * M * N, N);
  GemmArgs g;
  g.M = M, g.N = N, g.K = K, g.a = a.device.data(), g.lda = K, g.b = b.device.data(), g.ldb = K;
  g.c = c.device.data(), g.ldc = N;
  gemm_batched_cuda_mma(g, count, M * K, N * K, M * N, cuda_stream());
  expect_close(download(c, spec::DType::f32), want, true, 0);
}

// The layouts that cuBLASLt and CUTLASS read, element by element.
TEST(CudaGemm, Fp8ScaleLayouts) {
  for (const auto& [m, padded, nb, kb] :
       {std::array<int64_t, 4>{1, 4, 1, 1}, {5, 8, 2, 3}, {12, 12, 3, 4}, {130, 132, 19, 57}})
    for (const bool transposed : {false, true}) {
      const int64_t stride = (kb + 3) / 4 * 4;
      Array sa = make(m * kb, spec::DType::f32, false, 1),
            sb = make(nb * kb, spec::DType::f32, false, 2),
            to_a = make(kb * padded, spec::DType::f32, false, 3),
            to_b = make(nb * stride, spec::DType::f32, false, 4);
      fp8_scales_cuda_simt({m, padded, nb, kb, sa.device.as<float>(), to_a.device.as<float>(),
                            sb.device.as<float>(), to_b.device.as<float>(), stride, transposed},
                           cuda_stream());
      cuda_synchronize(cuda_stream());
      const auto a = download(to_a, spec::DType::f32), b = download(to_b, spec::DType::f32);
      for (int64_t k = 0; k < kb; ++k)
        for (int64_t i = 0; i < padded; ++i)
          ASSERT_EQ(a[size_t(k * padded + i)], i < m ? float(sa.values[size_t(i * kb + k)]) : 0.0f);
      for (int64_t j = 0; j < nb; ++j)
        for (int64_t k = 0; k < (transposed ? kb : stride); ++k)
          ASSERT_EQ(b[size_t(transposed ? k * nb + j : j * stride + k)],
                    k < kb ? float(sb.values[size_t(j * kb + k)]) : 0.0f);
    }
}

TEST(CudaGemm, Fp8BlockScaled) {
  using enum spec::DType;
  for (const auto& s : {std::array<int64_t, 3>{1, 1, 1},
                        {5, 64, 256},
                        {12, 63, 200},
                        {13, 200, 129},
                        {25, 300, 260},
                        {130, 192, 77},
                        {70, 140, 1040},
                        {1410, 1300, 144}})
    for (const auto out : {bf16, f32})
      for (const bool exact : {true, false}) {
        if (s[0] > 1000 && (exact != (out == bf16))) continue;  // enough of the big one
        SCOPED_TRACE(testing::Message() << s[0] << "x" << s[1] << "x" << s[2] << " " << int(out)
                                        << " exact=" << exact);
        const int64_t m = s[0], n = s[1], k = s[2], kb = spec::fp8_blocks(k);
        Array a = make(m * k, f8e4m3, exact, 1, 150), b = make(n * k, f8e4m3, exact, 2, 110);
        Array sa = make(m * kb, f32, true, 3), sb = make(spec::fp8_blocks(n) * kb, f32, true, 4);
        for (Array* x : {&sa, &sb}) {
          for (double& v : x->values) v = std::exp2(exact ? double(int(v) % 2) : v / 3);
          upload(*x, f32);
        }
        Array c = make(m * n, out, true, 5);
        const auto codes = [](const Array& x) {
          std::vector<spec::f8e4m3> v(x.values.size());
          for (size_t i = 0; i < v.size(); ++i) v[i] = spec::to_f8e4m3(float(x.values[i]));
          return v;
        };
        const std::vector<float> fa(sa.values.begin(), sa.values.end()),
            fb(sb.values.begin(), sb.values.end());
        std::vector<double> want(size_t(m * n));
        ref::fp8_gemm<double>(m, n, k, codes(a).data(), fa.data(), codes(b).data(), fb.data(),
                              want.data());
        if (exact && out == bf16)
          for (double& v : want) v = spec::to_float(spec::to_bf16(float(v)));
        fp8_gemm_cuda_mma(
            {m, n, k, a.device.as<spec::f8e4m3>(), sa.device.as<float>(),
             b.device.as<spec::f8e4m3>(), sb.device.as<float>(), out, c.device.data()},
            cuda_stream());
        cuda_synchronize(cuda_stream());
        expect_close(download(c, out), want, exact, out == bf16 ? 3e-3 : 1e-5);
      }
}

// Library forms are rows with a reason in a build that cannot have them, never silence (law 7).
TEST(CudaGemm, LibraryFormsSayWhyTheyAreNotHere) {
  const std::map<std::string, std::vector<std::string>> wanted = {
      {"gemm", {"cuda_cublaslt", "cuda_cutlass_sm90"}},
      {"fp8_gemm", {"cuda_cublaslt", "cuda_cutlass_sm90"}},
      {"lm_head_ce", {"cuda_cublaslt"}},
      {"mla_absorb", {"cuda_cublaslt"}},
      {"moe_experts", {"cuda_cublas"}}};
  size_t seen = 0;
  for (const auto& op : bench::all_ops()) {
    const auto found = wanted.find(op->name());
    if (found == wanted.end()) continue;
    for (const std::string& how : found->second) {
      EXPECT_EQ(op->is_baseline(how), how.find("cublas") != std::string::npos) << how;
      for (const auto& c : op->cases()) {
        const bench::Support s = op->support(how, c.text);
        EXPECT_EQ(s.state, bench::Support::State::not_built) << op->name() << "." << how;
        EXPECT_FALSE(s.reason.empty());
      }
      ++seen;
    }
  }
  EXPECT_EQ(seen, 7u);
  GemmArgs g;
  EXPECT_FALSE(cutlass_missing().empty());
  EXPECT_FALSE(cublaslt_missing().empty());
  EXPECT_EQ(cublaslt_refuses(g), cublaslt_missing());
  EXPECT_THROW(cublaslt_plan(g), Error);
}
// SPEC 0.6: FP8 sums on Hopper's tensor cores have a class of their own, the exact fill has none.
TEST(CudaGemm, ToleranceOfAnImplementation) {
  for (const auto& op : bench::all_ops()) {
    if (op->name() != "fp8_gemm") continue;
    const std::string text = "m=128,n=4096,k=7168";
    const auto plain = op->tolerance(text, bench::Fill::real, "c"),
               ours = op->tolerance_of("cuda_mma", text, bench::Fill::real, "c"),
               hopper = op->tolerance_of("cuda_cublaslt", text, bench::Fill::real, "c"),
               exact = op->tolerance_of("cuda_cublaslt", text, bench::Fill::exact, "c");
    EXPECT_EQ(plain.rel_fro, ours.rel_fro);
    EXPECT_EQ(plain.rel_fro, 3e-3);
    EXPECT_EQ(hopper.rel_fro, 6e-3);
    EXPECT_EQ(exact.rel_fro + exact.abs_rms + exact.rel + exact.abs, 0);
    return;
  }
  FAIL() << "no fp8_gemm";
}

}  // namespace
}  // namespace v3b::kern
