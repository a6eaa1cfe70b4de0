// gemm() against the plain reference: every layout, dtype, odd size, pad column and caller thread;
// and the top-k backward forms (SPEC 1.24).
#include <gtest/gtest.h>
#include <omp.h>
#include <unistd.h>

#include <cmath>
#include <cstdlib>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include "kernels/core/buffer.h"
#include "kernels/core/cpu.h"
#include "kernels/gemm/gemm.h"
#include "kernels/gemm/topk_backward.h"
#include "reference/gemm.h"
#include "reference/topk.h"

namespace v3b {
namespace {

using spec::bf16;
using spec::DType;

struct Problem {
  int64_t M, N, K;
  bool trans_a, trans_b;
  DType ab, c;
  bool accumulate;
  int64_t pad = 0;    // extra columns of every leading dimension
  int64_t count = 1;  // batched
  bool share_b = false;
};

double get(const void* p, DType t, int64_t i) {
  return t == DType::bf16 ? spec::to_float(static_cast<const bf16*>(p)[i])
                          : static_cast<const float*>(p)[i];
}

// Values rounded to the dtype; exact: integers -3..3.
std::vector<uint8_t> values(int64_t n, DType t, bool exact, uint64_t seed) {
  std::mt19937_64 rng(seed);
  std::normal_distribution<float> normal;
  std::vector<uint8_t> out(n * spec::dtype_bytes(t));
  for (int64_t i = 0; i < n; ++i) {
    const float v = exact ? static_cast<float>(static_cast<int64_t>(rng() % 7) - 3) : normal(rng);
    if (t == DType::bf16) {
      reinterpret_cast<bf16*>(out.data())[i] = spec::to_bf16(v);
    } else {
      reinterpret_cast<float*>(out.data())[i] = v;
    }
  }
  return out;
}

void check(const Problem& p, bool exact, bool in_parallel = false) {
  SCOPED_TRACE("M" + std::to_string(p.M) + " N" + std::to_string(p.N) + " K" + std::to_string(p.K) +
               " ta" + std::to_string(p.trans_a) + " tb" + std::to_string(p.trans_b) + " " +
               spec::dtype_name(p.ab) + "->" + spec::dtype_name(p.c) + " acc" +
               std::to_string(p.accumulate) + " pad" + std::to_string(p.pad) + " count" +
               std::to_string(p.count));
  const int64_t lda = (p.trans_a ? p.M : p.K) + p.pad, ldb = (p.trans_b ? p.K : p.N) + p.pad,
                ldc = p.N + p.pad;
  const int64_t sa = (p.trans_a ? p.K : p.M) * lda,
                sb = p.share_b ? 0 : (p.trans_b ? p.N : p.K) * ldb, sc = p.M * ldc,
                nb = (p.trans_b ? p.N : p.K) * ldb;
  const auto a = values(p.count * sa, p.ab, exact, 1),
             b = values(p.share_b ? nb : p.count * nb, p.ab, exact, 2);
  // C holds small integers; pad columns must keep them.
  auto c = values(p.count * sc, p.c, true, 3);
  const auto before = c;
  kern::GemmArgs g;
  g.M = p.M, g.N = p.N, g.K = p.K;
  g.a = a.data(), g.lda = lda, g.trans_a = p.trans_a;
  g.b = b.data(), g.ldb = ldb, g.trans_b = p.trans_b;
  g.c = c.data(), g.ldc = ldc, g.ab_type = p.ab, g.c_type = p.c, g.accumulate = p.accumulate;
  const auto call = [&] {
    if (p.count == 1) {
      kern::gemm(g);
    } else {
      kern::gemm_batched(g, p.count, sa, sb, sc);
    }
  };
  if (in_parallel) {
#pragma omp parallel num_threads(2)
#pragma omp single
    call();
  } else {
    call();
  }
  double diff2 = 0, norm2 = 0;
  for (int64_t q = 0; q < p.count; ++q) {
    std::vector<double> da(sa), db(nb), dc(sc);
    for (int64_t i = 0; i < sa; ++i) da[i] = get(a.data(), p.ab, q * sa + i);
    for (int64_t i = 0; i < nb; ++i) db[i] = get(b.data(), p.ab, q * sb + i);
    for (int64_t i = 0; i < sc; ++i) dc[i] = get(before.data(), p.c, q * sc + i);
    ref::gemm<double>(p.M, p.N, p.K, da.data(), lda, p.trans_a, db.data(), ldb, p.trans_b,
                      dc.data(), ldc, p.accumulate);
    for (int64_t i = 0; i < sc; ++i) {
      const double got = get(c.data(), p.c, q * sc + i);
      const bool is_pad = i % ldc >= p.N;
      if (exact || is_pad) {
        const double want =
            p.c == DType::bf16 ? spec::to_float(spec::to_bf16(static_cast<float>(dc[i]))) : dc[i];
        ASSERT_EQ(got, want) << "element " << i << (is_pad ? " (pad column)" : "");
      }
      diff2 += (got - dc[i]) * (got - dc[i]), norm2 += dc[i] * dc[i];
    }
  }
  const double bound = p.c == DType::bf16 ? 3e-3 : 1e-5;
  EXPECT_TRUE(std::sqrt(diff2) <= bound * std::sqrt(norm2)) << std::sqrt(diff2 / norm2);
}

// Every level that this machine has, in one process, as the harness runs them.
class GemmLevels : public testing::TestWithParam<kern::Isa> {};
INSTANTIATE_TEST_SUITE_P(Isa, GemmLevels,
                         testing::Values(kern::Isa::avx2, kern::Isa::avx512, kern::Isa::avx512_bf16,
                                         kern::Isa::amx),
                         [](const auto& i) { return std::string(kern::isa_name(i.param)); });

TEST_P(GemmLevels, TilesAndRemaindersOfBothSides) {
  if (GetParam() > kern::best_isa()) GTEST_SKIP() << "this CPU has no such level";
  const kern::IsaCap cap(GetParam());
  EXPECT_EQ(kern::best_isa(), GetParam());
  // Lanes of 1 to 7 groups, rows with every remainder of the tiles, K in several blocks with a tail.
  const int64_t sizes[][3] = {{17, 97, 66},    {33, 250, 130},  {48, 55, 1100},  {65, 131, 2050},
                              {100, 47, 96},   {112, 121, 33},  {520, 29, 64},   {600, 130, 40},
                              {300, 64, 3000}, {25, 300, 1024}, {130, 63, 1025}, {40, 40, 32}};
  for (const auto& s : sizes) {
    for (const bool ta : {false, true}) {
      for (const bool tb : {false, true}) {
        for (const DType ab : {DType::bf16, DType::f32}) {
          check({s[0], s[1], s[2], ta, tb, ab, DType::f32, ta == tb, 2}, true);
          check({s[1], s[0], s[2], ta, tb, ab, DType::bf16, false, 1}, true);
        }
      }
    }
  }
  check({40, 300, 5000, false, true, DType::bf16, DType::f32, false}, false);
  check({400, 90, 7168, true, false, DType::bf16, DType::f32, true}, false);
  check({24, 256, 7168, false, true, DType::f32, DType::f32, false}, false);
}

TEST(Gemm, ExactInEveryLayout) {
  const int64_t sizes[][3] = {{1, 1, 1},     {1, 80, 256},   {2, 7, 3},      {3, 64, 65},
                              {12, 33, 130}, {13, 31, 17},   {16, 16, 16},   {65, 80, 256},
                              {137, 80, 77}, {128, 256, 80}, {100, 257, 96}, {200, 130, 199},
                              {1, 1000, 1},  {64, 1, 64}};
  for (const auto& s : sizes) {
    for (const bool ta : {false, true}) {
      for (const bool tb : {false, true}) {
        for (const DType ab : {DType::bf16, DType::f32}) {
          check({s[0], s[1], s[2], ta, tb, ab, DType::f32, false}, true);
          check({s[0], s[1], s[2], ta, tb, ab, DType::f32, true, 5}, true);
          check({s[0], s[1], s[2], ta, tb, ab, DType::bf16, false, 3}, true);
        }
      }
    }
  }
}

TEST(Gemm, RealValuesWithinTolerance) {
  for (const DType ab : {DType::bf16, DType::f32}) {
    for (const int64_t m : {1, 8, 40, 129}) {
      check({m, 160, 512, false, true, ab, DType::f32, false}, false);
      check({m, 160, 512, false, true, ab, DType::bf16, false}, false);
      check({m, 96, 1000, true, false, ab, DType::f32, true}, false);
    }
  }
}

TEST(Gemm, EmptyDimensions) {
  for (const bool acc : {false, true}) {
    check({4, 8, 0, false, true, DType::bf16, DType::f32, acc, 2}, true);
    check({0, 8, 4, false, true, DType::bf16, DType::f32, acc}, true);
    check({4, 0, 4, false, true, DType::f32, DType::f32, acc}, true);
  }
  check({4, 8, 0, false, true, DType::bf16, DType::bf16, false}, true);
}

TEST(Gemm, Batched) {
  for (const bool tb : {false, true}) {
    check({17, 40, 64, false, tb, DType::bf16, DType::f32, false, 0, 3}, true);
    check({70, 33, 129, false, tb, DType::f32, DType::f32, true, 4, 2}, true);
    check({9, 24, 48, true, tb, DType::bf16, DType::bf16, false, 0, 4}, true);
    check({20, 24, 48, false, tb, DType::bf16, DType::f32, false, 0, 3, true}, true);
  }
}

TEST(Gemm, InsideAParallelRegionTheWholeResultIsComputed) {
  check({96, 256, 128, false, true, DType::bf16, DType::f32, false},
        true);  // the same shape outside first
  check({96, 256, 128, false, true, DType::bf16, DType::f32, false}, true, true);
  check({4, 4096, 256, false, true, DType::bf16, DType::f32, false}, true, true);
}

TEST(Gemm, ManyThreadsAtOnce) {
  constexpr int64_t kM = 40, kN = 80, kK = 64;
  const auto a = values(kM * kK, DType::bf16, true, 1), b = values(kN * kK, DType::bf16, true, 2);
  std::vector<std::vector<float>> c(8, std::vector<float>(kM * kN, NAN));
#pragma omp parallel for num_threads(4)
  for (int i = 0; i < 8; ++i) {
    kern::GemmArgs g;
    g.M = kM, g.N = kN, g.K = kK, g.a = a.data(), g.lda = kK, g.b = b.data(), g.ldb = kK;
    g.c = c[i].data(), g.ldc = kN;
    kern::gemm(g);
  }
  kern::GemmArgs g;
  g.M = kM, g.N = kN, g.K = kK, g.a = a.data(), g.lda = kK, g.b = b.data(), g.ldb = kK;
  std::vector<float> want(kM * kN);
  g.c = want.data(), g.ldc = kN;
  kern::gemm(g);
  for (const auto& x : c) EXPECT_EQ(x, want);
}

TEST(Gemm, ConversionsEqualTheScalarOnes) {
  std::vector<float> x = {0.0F,     -0.0F,     1.0F, 1.00390625F, 3.4e38F,
                          INFINITY, -INFINITY, NAN,  1e-40F,      1.01171875F};
  std::mt19937 rng(5);
  for (int i = 0; i < 100000; ++i) x.push_back(std::bit_cast<float>(static_cast<uint32_t>(rng())));
  std::vector<bf16> h(x.size());
  std::vector<float> back(x.size());
  kern::convert_f32_to_bf16(x.data(), h.data(), static_cast<int64_t>(x.size()));
  kern::convert_bf16_to_f32(h.data(), back.data(), static_cast<int64_t>(x.size()));
  for (size_t i = 0; i < x.size(); ++i) {
    ASSERT_EQ(h[i].bits, spec::to_bf16(x[i]).bits) << x[i];
    ASSERT_EQ(std::bit_cast<uint32_t>(back[i]), std::bit_cast<uint32_t>(spec::to_float(h[i])));
  }
}

TEST(Cpu, BufferIsAlignedAndZeroWhenTouched) {
  for (const int64_t n : {1, 1000, 3 << 20}) {
    kern::Buffer<float> b(n);
    EXPECT_EQ(reinterpret_cast<uintptr_t>(b.data()) % kern::kBufferAlign, 0U);
    EXPECT_EQ(std::accumulate(b.begin(), b.end(), 0.0F), 0.0F);
  }
  EXPECT_FALSE(kern::cpu_features().brand.empty());
}

// The same tests on lower instruction sets, in a process of their own, since the choice is made
// once.
TEST(Cpu, LowerInstructionSets) {
  if (std::getenv("V3BENCH_MAX_ISA") != nullptr) GTEST_SKIP() << "already capped";
  char self[4096] = {};
  ASSERT_GT(readlink("/proc/self/exe", self, sizeof self - 1), 0);
  for (const std::string isa : {"avx2", "avx512"}) {
    const std::string cmd = "V3BENCH_MAX_ISA=" + isa + " '" + self +
                            "' --gtest_brief=1 --gtest_filter='Gemm.*' > /dev/null";
    EXPECT_EQ(std::system(cmd.c_str()), 0) << cmd;
  }
  if (kern::cpu_features().avx512_bf16 && !kern::cpu_features().amx_bf16) {  // AMX on arrays
    const std::string cmd = "V3BENCH_AMX=emulate '" + std::string(self) +
                            "' --gtest_brief=1 --gtest_filter='Gemm.*:*GemmLevels*amx' > /dev/null";
    EXPECT_EQ(std::system(cmd.c_str()), 0) << cmd;
  }
}

// ---- top-k
// ---------------------------------------------------------------------------------------------

TEST(TopK, LargerFirstThenLowerIndex) {
  const std::vector<double> s = {0.5, 0.9, 0.5, 0.9, NAN, 0.1};
  std::vector<int32_t> idx(4);
  std::vector<double> v(4);
  ref::topk_select<double>(1, 6, 4, s.data(), idx.data(), v.data());
  EXPECT_EQ(idx, (std::vector<int32_t>{1, 3, 0, 2}));
  EXPECT_EQ(v, (std::vector<double>{0.9, 0.9, 0.5, 0.5}));
}

TEST(TopK, ExactBackwardIsTheFiniteDifferenceAndTheStraightThroughIsNot) {
  constexpr int64_t kT = 5, kE = 16, kK = 4;
  std::mt19937_64 rng(7);
  std::normal_distribution<double> normal;
  std::vector<double> s(kT * kE), up(kT * kE), up_values(kT * kK);
  for (double& x : s) x = normal(rng);
  for (double& x : up) x = normal(rng);
  std::vector<int32_t> idx(kT * kK);
  std::vector<double> values(kT * kK), ds(kT * kE), ds_values(kT * kE), ste(kT * kE);
  ref::topk_select<double>(kT, kE, kK, s.data(), idx.data(), values.data());
  for (int64_t i = 0; i < kT * kK; ++i) up_values[i] = up[i / kK * kE + idx[i]];
  ref::topk_backward<double>(kT, kE, kK, idx.data(), up.data(), ds.data(), false);
  ref::topk_backward<double>(kT, kE, kK, idx.data(), up.data(), ste.data(), true);
  ref::topk_backward_values<double>(kT, kE, kK, idx.data(), up_values.data(), ds_values.data());
  EXPECT_EQ(ds, ds_values);
  EXPECT_EQ(ste, up);
  // L = sum over selected of s_i * up_i
  const auto loss = [&](const std::vector<double>& x) {
    std::vector<int32_t> i(kT * kK);
    std::vector<double> v(kT * kK);
    ref::topk_select<double>(kT, kE, kK, x.data(), i.data(), v.data());
    double l = 0;
    for (int64_t q = 0; q < kT * kK; ++q) l += v[q] * up[q / kK * kE + i[q]];
    return l;
  };
  int64_t zeros = 0;
  double ste_error = 0;
  for (int64_t i = 0; i < kT * kE; ++i) {
    auto hi = s, lo = s;
    hi[i] += 1e-6, lo[i] -= 1e-6;
    const double numeric = (loss(hi) - loss(lo)) / 2e-6;
    EXPECT_NEAR(ds[i], numeric, 1e-6);
    zeros += ds[i] == 0.0;
    ste_error = std::max(ste_error, std::abs(ste[i] - numeric));
  }
  EXPECT_EQ(zeros, kT * (kE - kK));  // the zero pattern is exact
  EXPECT_GT(ste_error, 0.1);
}

// softmax -> top-k -> renormalise: unselected logits get exactly zero (the normalisers cancel);
// without renormalisation all logits get gradient through the softmax.
TEST(TopK, SoftmaxGateGradients) {
  constexpr int64_t kE = 8, kK = 3;
  const std::vector<double> z = {0.3, -1.0, 2.0, 0.7, -0.2, 1.1, -2.0, 0.0}, up = {1.0, -0.5, 0.25};
  const auto loss = [&](const std::vector<double>& x, bool renormalise) {
    std::vector<double> p(kE), v(kK);
    double sum = 0;
    for (int64_t i = 0; i < kE; ++i) sum += p[i] = std::exp(x[i]);
    for (double& q : p) q /= sum;
    std::vector<int32_t> idx(kK);
    ref::topk_select<double>(1, kE, kK, p.data(), idx.data(), v.data());
    double l = 0, tau = v[0] + v[1] + v[2];
    for (int64_t k = 0; k < kK; ++k) l += up[k] * v[k] / (renormalise ? tau : 1.0);
    return l;
  };
  for (int64_t i = 0; i < kE; ++i) {
    auto hi = z, lo = z;
    hi[i] += 1e-6, lo[i] -= 1e-6;
    const bool selected = i == 2 || i == 5 || i == 3;
    const double renormalised = (loss(hi, true) - loss(lo, true)) / 2e-6;
    const double raw = (loss(hi, false) - loss(lo, false)) / 2e-6;
    if (selected) {
      EXPECT_GT(std::abs(renormalised), 1e-3);
    } else {
      EXPECT_NEAR(renormalised, 0.0, 1e-9);
    }
    EXPECT_GT(std::abs(raw), 1e-4);
  }
}

TEST(TopK, KernelEqualsReference) {
  for (const bool ste : {false, true}) {
    constexpr int64_t kT = 300, kE = 257, kK = 8;
    std::mt19937_64 rng(3);
    std::vector<float> s(kT * kE), dy(kT * kE), want(kT * kE), got(kT * kE, NAN);
    for (float& x : s) x = static_cast<float>(rng() % 1000);
    for (float& x : dy) x = static_cast<float>(rng() % 1000);
    std::vector<int32_t> idx(kT * kK);
    ref::topk_select<float>(kT, kE, kK, s.data(), idx.data(), nullptr);
    ref::topk_backward<float>(kT, kE, kK, idx.data(), dy.data(), want.data(), ste);
    kern::topk_backward_cpu_simd({kT, kE, kK, ste, idx.data(), dy.data(), got.data()});
    EXPECT_EQ(got, want);
  }
}

}  // namespace
}  // namespace v3b
