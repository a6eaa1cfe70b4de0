// Expert kernels against the reference: every pair of types, odd sizes, uneven loads, unused slots,
// poison, thread counts, batch invariance, no allocation in the steady state.
#include <gtest/gtest.h>
#include <malloc.h>
#include <omp.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdlib>
#include <numeric>
#include <random>
#include <vector>

#include "kernels/core/cpu.h"
#include "kernels/moe/moe.h"
#include "kernels/moe/packed_experts.h"
#include "reference/moe.h"

namespace {
std::atomic<int64_t> allocations{0};
}
// Not inlined: GCC would pair the inlined malloc with the library's delete and warn.
[[gnu::noinline]] void* operator new(size_t n) {
  ++allocations;
  if (void* p = std::malloc(n)) return p;
  throw std::bad_alloc();
}
// std::stable_partition takes its buffer so; the sanitizer's own form would not pair with our delete.
[[gnu::noinline]] void* operator new(size_t n, const std::nothrow_t&) noexcept {
  ++allocations;
  return std::malloc(n);
}
[[gnu::noinline]] void operator delete(void* p) noexcept { std::free(p); }
[[gnu::noinline]] void operator delete(void* p, size_t) noexcept { std::free(p); }

namespace v3b {
namespace {

using spec::DType;

double get(const void* p, DType t, int64_t i) {
  switch (t) {
    case DType::bf16:
      return spec::to_float(static_cast<const spec::bf16*>(p)[i]);
    case DType::f8e4m3:
      return spec::to_float(static_cast<const spec::f8e4m3*>(p)[i]);
    default:
      return static_cast<const float*>(p)[i];
  }
}
void put(void* p, DType t, int64_t i, float v) {
  switch (t) {
    case DType::bf16:
      static_cast<spec::bf16*>(p)[i] = spec::to_bf16(v);
      break;
    case DType::f8e4m3:
      static_cast<spec::f8e4m3*>(p)[i] = spec::to_f8e4m3(v);
      break;
    default:
      static_cast<float*>(p)[i] = v;
  }
}

// A weight matrix [rows, cols] in its storage type, with scales for FP8.
struct Matrix {
  int64_t rows, cols;
  DType t;
  std::vector<uint8_t> data;
  std::vector<float> scale;
  Matrix(int64_t r, int64_t c, DType type, std::mt19937_64& rng) : rows(r), cols(c), t(type) {
    std::normal_distribution<float> normal;
    const float std = 1 / std::sqrt(static_cast<float>(cols));
    data.resize(rows * cols * spec::dtype_bytes(t));
    if (t == DType::f8e4m3) {
      scale.resize((rows + 127) / 128 * ((cols + 127) / 128));
      for (float& s : scale) s = std / 50 * (0.5F + static_cast<float>(rng() % 1000) * 1e-3F);
    }
    for (int64_t i = 0; i < rows * cols; ++i)
      put(data.data(), t, i, t == DType::f8e4m3 ? 50 * normal(rng) : std * normal(rng));
  }
  std::vector<double> dequantised() const {
    std::vector<double> v(rows * cols);
    for (int64_t i = 0; i < rows * cols; ++i) {
      v[i] = get(data.data(), t, i);
      if (!scale.empty()) v[i] *= scale[i / cols / 128 * ((cols + 127) / 128) + i % cols / 128];
    }
    return v;
  }
  void poison() {
    for (int64_t i = 0; i < rows * cols; ++i) put(data.data(), t, i, NAN);
    for (float& s : scale) s = NAN;
  }
};
struct Expert {
  Matrix gate, up, down;
  Expert(int64_t d, int64_t m, DType t, std::mt19937_64& rng)
      : gate(m, d, t, rng), up(m, d, t, rng), down(d, m, t, rng) {}
  spec::FfnPointers view() const {
    return {gate.data.data(),  up.data.data(),  down.data.data(),
            gate.scale.data(), up.scale.data(), down.scale.data()};
  }
};

struct Layer {
  int64_t T, d, m, E, K, shared_m;
  DType xt, wt;
  std::vector<uint8_t> x, y;
  std::vector<int32_t> idx;
  std::vector<float> w;
  std::vector<Expert> experts;
  std::vector<spec::FfnPointers> views;

  Layer(int64_t T_, int64_t d_, int64_t m_, int64_t E_, int64_t K_, int64_t sm, DType x_type,
        DType w_type,
        int64_t popular = 0)  // > 0: every token also takes one of the first `popular` experts
      : T(T_), d(d_), m(m_), E(E_), K(K_), shared_m(sm), xt(x_type), wt(w_type) {
    std::mt19937_64 rng(T * 7 + d * 3 + m);
    std::normal_distribution<float> normal;
    x.resize(T * d * spec::dtype_bytes(xt));
    y.resize(x.size());
    for (int64_t i = 0; i < T * d; ++i) put(x.data(), xt, i, normal(rng));
    std::vector<int32_t> order(E);
    std::iota(order.begin(), order.end(), 0);
    for (int64_t t = 0; t < T; ++t) {
      std::shuffle(order.begin(), order.end(), rng);
      auto row = order;
      if (popular > 0)
        std::stable_partition(row.begin(), row.end(), [&](int32_t e) { return e < popular; });
      idx.insert(idx.end(), row.begin(), row.begin() + K);
    }
    for (int64_t i = 0; i < T * K; ++i)
      w.push_back(0.1F + static_cast<float>(rng() % 1000) * 1e-3F);
    for (int64_t e = 0; e < E; ++e) experts.emplace_back(d, m, wt, rng);
    experts.emplace_back(d, shared_m, wt, rng);
  }
  void poison_unchosen() {
    for (int64_t e = 0; e < E; ++e)
      if (std::find(idx.begin(), idx.end(), e) == idx.end())
        for (Matrix* v : {&experts[e].gate, &experts[e].up, &experts[e].down}) v->poison();
  }
  spec::MoeExpertsArgs args() {
    views.clear();
    for (const Expert& e : experts) views.push_back(e.view());
    std::fill(y.begin(), y.end(), uint8_t{0xff});  // NaN
    return {T,        d,       m,        E,          K,        shared_m,
            xt,       wt,      x.data(), idx.data(), w.data(), views.data(),
            views[E], y.data()};
  }
  std::vector<double> reference() const {
    std::vector<std::vector<double>> keep;
    std::vector<ref::Ffn<double>> f;
    for (const Expert& e : experts) {
      for (const Matrix* v : {&e.gate, &e.up, &e.down}) keep.push_back(v->dequantised());
      const size_t n = keep.size();
      f.push_back({keep[n - 3].data(), keep[n - 2].data(), keep[n - 1].data()});
    }
    std::vector<double> xd(T * d), yd(T * d), wd(w.begin(), w.end());
    for (int64_t i = 0; i < T * d; ++i) xd[i] = get(x.data(), xt, i);
    const ref::Ffn<double> shared = shared_m > 0 ? f[E] : ref::Ffn<double>{};
    f.pop_back();
    ref::moe<double>(T, d, m, E, K, xd.data(), idx.data(), wd.data(), f, shared, shared_m,
                     yd.data());
    return yd;
  }
};

using Kernel = void (*)(const spec::MoeExpertsArgs&, kern::MoeScratch&) noexcept;

kern::PackedExperts pack(const spec::MoeExpertsArgs& a) {
  return {{a.d, a.m, a.E, a.shared_m, a.w_dtype}, a.experts, a.shared};
}
void cpu_packed(const spec::MoeExpertsArgs& a, kern::MoeScratch& s) noexcept {
  const kern::PackedExperts w = pack(a);
  spec::MoeExpertsArgs rest = a;
  rest.experts = nullptr, rest.shared = {};
  kern::moe_experts_cpu_packed(rest, w, s);
}

// Elements against float64 on the stored operands, by norm and one by one.
void expect_close(Layer& l, Kernel kernel, const char* name) {
  SCOPED_TRACE("T" + std::to_string(l.T) + " d" + std::to_string(l.d) + " m" + std::to_string(l.m) +
               " E" + std::to_string(l.E) + " K" + std::to_string(l.K) + " " +
               spec::dtype_name(l.xt) + " x " + spec::dtype_name(l.wt) + " " + name);
  kern::MoeScratch scratch;
  kernel(l.args(), scratch);
  const auto expected = l.reference();
  // One rounding of the hidden rows (its error, 1.66e-3 RMS in bf16, spreads over the sums) and one
  // of y; in fp32 the sums themselves. An element may be six deviations off beside its own
  // rounding.
  const bool bf16 = l.xt == DType::bf16;
  const double sigma = bf16 ? 1.66e-3 : 1e-6, own = bf16 ? 0x1p-8 : 0x1p-22,
               total = bf16 ? 3e-3 : 2e-6;
  double err = 0, norm = 0;
  for (int64_t t = 0; t < l.T; ++t) {
    double row = 0;
    for (int64_t j = 0; j < l.d; ++j) row += expected[t * l.d + j] * expected[t * l.d + j];
    norm += row;
    const double rms = std::sqrt(row / static_cast<double>(l.d));
    for (int64_t i = t * l.d; i < (t + 1) * l.d; ++i) {
      const double e = get(l.y.data(), l.xt, i) - expected[i];
      err += e * e;
      ASSERT_LE(std::abs(e), 6 * sigma * rms + own * std::abs(expected[i])) << "element " << i;
    }
  }
  EXPECT_LE(std::sqrt(err / norm), total);
}
void expect_close(Layer& l) {
  expect_close(l, kern::moe_experts_cpu_simd, "cpu_simd");
  if (kern::PackedExperts::supports(l.xt, l.wt)) expect_close(l, cpu_packed, "cpu_packed");
}

constexpr std::pair<DType, DType> kPairs[] = {
    {DType::f32, DType::f32},    {DType::bf16, DType::bf16}, {DType::bf16, DType::f8e4m3},
    {DType::f32, DType::f8e4m3}, {DType::f32, DType::bf16},  {DType::bf16, DType::f32}};

TEST(MoeKernel, AllTypesAndSizes) {
  for (const auto& [xt, wt] : kPairs)
    for (const int64_t T : {1, 2, 9, 50}) {
      Layer tiny(T, 256, 80, 8, 4, 80, xt, wt);
      tiny.poison_unchosen();
      expect_close(tiny);
      Layer odd(T, 203, 37, 5, 2, 0, xt, wt);
      expect_close(odd);
      Layer blocks(T, 384, 260, 3, 2, 130, xt, wt);
      expect_close(blocks);
    }
}

TEST(MoeKernel, ManyRows) {
  for (const auto& [xt, wt] : kPairs) {
    Layer l(700, 144, 72, 4, 2, 40, xt, wt);  // beyond the row chunk and the token chunk
    expect_close(l);
  }
}

TEST(MoeKernel, UnevenLoads) {
  for (const auto& [xt, wt] : kPairs) {
    Layer l(300, 96, 48, 24, 3, 0, xt, wt, 1);  // expert 0 takes every token, others a few
    expect_close(l);
    Layer one(40, 64, 64, 6, 1, 0, xt, wt, 1);
    one.poison_unchosen();
    expect_close(one);
  }
}

TEST(MoeKernel, UnusedSlots) {
  for (const auto& [xt, wt] : kPairs) {
    Layer l(20, 64, 32, 6, 3, 0, xt, wt);
    for (size_t i = 0; i < l.idx.size(); i += 2) l.idx[i] = -1;
    for (int64_t k = 0; k < l.K; ++k) l.idx[7 * l.K + k] = -1;  // a token without any expert
    expect_close(l);
    for (int64_t j = 0; j < l.d; ++j) EXPECT_EQ(get(l.y.data(), xt, 7 * l.d + j), 0.0);
  }
}

TEST(MoeKernel, OneDnnComposition) {
  for (const auto& [xt, wt] : {kPairs[0], kPairs[1]})
    for (const int64_t T : {1, 9, 70}) {
      Layer l(T, 256, 80, 16, 4, 80, xt, wt);
      l.poison_unchosen();
      expect_close(l, kern::moe_experts_cpu_onednn, "cpu_onednn");
    }
}

// What packed experts are given by the router at worst: nobody, everybody, dropped slots, the shared expert alone.
TEST(MoeKernel, RaggedRoutes) {
  for (const auto& [xt, wt] : {kPairs[0], kPairs[1], kPairs[2]})
    for (const int64_t T : {1, 6, 37, 530}) {
      Layer l(T, 96, 56, 5, 2, 40, xt, wt);
      for (int64_t t = 0; t < T; ++t) l.idx[t * 2] = 3, l.idx[t * 2 + 1] = -1;  // all at one
      l.poison_unchosen();
      expect_close(l);
      for (int64_t t = 0; t < T; t += 3) l.idx[t * 2] = -1;  // its tokens lie apart
      l.idx[T * 2 - 1] = 4;                                  // one at another
      Layer apart = l;
      std::mt19937_64 rng(5);
      apart.experts[4] = Expert(96, 56, wt, rng);
      expect_close(apart);
      std::fill(l.idx.begin(), l.idx.end(), -1);
      l.poison_unchosen();
      expect_close(l);  // the shared one alone
    }
}

// Filled one by one, in any order, and the source released: what pack() has taken is all that is read.
TEST(MoeKernel, PackedExpertsOwnWhatTheyRead) {
  for (const auto& [xt, wt] : {kPairs[0], kPairs[1], kPairs[2]}) {
    Layer l(9, 256, 140, 6, 2, 80, xt, wt);
    const auto a = l.args();
    kern::MoeScratch s;
    cpu_packed(a, s);
    const auto expected = l.y;
    kern::PackedExperts w({a.d, a.m, a.E, a.shared_m, a.w_dtype});
    for (int64_t e = a.E; e >= 0; --e) {
      w.pack(e, e < a.E ? a.experts[e] : a.shared);
      for (Matrix* v : {&l.experts[e].gate, &l.experts[e].up, &l.experts[e].down}) v->poison();
    }
    EXPECT_GE(w.bytes(), (3 * 256 * 140 * 6 + 3 * 256 * 80) * spec::dtype_bytes(wt));
    kern::moe_experts_cpu_packed(l.args(), w, s);
    EXPECT_EQ(l.y, expected);
  }
}

std::vector<uint8_t> bits(Layer& l, kern::MoeScratch& s) {
  kern::moe_experts_cpu_simd(l.args(), s);
  return l.y;
}

TEST(MoeKernel, SameBitsOnAnyThreadCountAndAgain) {
  const int before = omp_get_max_threads();
  for (const auto& [xt, wt] : kPairs)
    for (const int64_t T : {3, 300}) {
      Layer l(T, 256, 80, 16, 4, 80, xt, wt);
      kern::MoeScratch s;
      omp_set_num_threads(1);
      const auto one = bits(l, s);
      omp_set_num_threads(3);
      EXPECT_EQ(bits(l, s), one);
      EXPECT_EQ(bits(l, s), one);
#pragma omp parallel num_threads(2)
#pragma omp single
      EXPECT_EQ(bits(l, s), one);  // a caller that is parallel already
    }
  omp_set_num_threads(before);
}
TEST(MoeKernel, PackedGivesTheSameBitsOnAnyThreadCount) {
  const int before = omp_get_max_threads();
  for (const auto& [xt, wt] : {kPairs[0], kPairs[1], kPairs[2]})
    for (const int64_t T : {1, 3, 300}) {
      Layer l(T, 512, 400, 16, 4, 144, xt, wt);  // large enough for a team at one token
      const auto w = pack(l.args());
      kern::MoeScratch s;
      const auto run = [&] {
        kern::moe_experts_cpu_packed(l.args(), w, s);
        return l.y;
      };
      omp_set_num_threads(1);
      const auto one = run();
      for (const int threads : {2, 3, 7, 3}) {
        omp_set_num_threads(threads);
        EXPECT_EQ(run(), one) << threads;
      }
#pragma omp parallel num_threads(2)
#pragma omp single
      EXPECT_EQ(run(), one);  // a caller that is parallel already
    }
  omp_set_num_threads(before);
}

// Up to a few tokens a row's result does not depend on its company: a verified draft equals plain
// decoding.
TEST(MoeKernel, BatchInvariantDecode) {
  for (const auto& [xt, wt] : {kPairs[1], kPairs[2]}) {
    Layer l(4, 256, 80, 16, 4, 80, xt, wt);
    kern::MoeScratch s;
    const auto all = bits(l, s);
    const int64_t row = l.d * spec::dtype_bytes(xt);
    for (int64_t t = 0; t < 4; ++t) {
      Layer one = l;
      one.T = 1;
      one.x.assign(l.x.begin() + t * row, l.x.begin() + (t + 1) * row);
      one.idx.assign(l.idx.begin() + t * l.K, l.idx.begin() + (t + 1) * l.K);
      one.w.assign(l.w.begin() + t * l.K, l.w.begin() + (t + 1) * l.K);
      one.y.resize(row);
      EXPECT_EQ(bits(one, s),
                std::vector<uint8_t>(all.begin() + t * row, all.begin() + (t + 1) * row));
    }
  }
}

TEST(MoeKernel, SteadyStateAllocatesNothing) {
  for (const auto& [xt, wt] : {kPairs[0], kPairs[1], kPairs[2]}) {
    SCOPED_TRACE(spec::dtype_name(xt));
    // As many rows as the streaming products take; beyond, oneDNN allocates as it likes.
    const bool dot = xt == DType::bf16 && kern::cpu_features().avx512_bf16;
    Layer big(dot ? 8 : 4, 256, 80, 16, 4, 80, xt, wt), small(2, 256, 80, 16, 4, 80, xt, wt);
    kern::MoeScratch s;
    const auto a = big.args(), b = small.args();
    for (int i = 0; i < 2; ++i) {
      kern::moe_experts_cpu_simd(a, s);
      kern::moe_experts_cpu_simd(b, s);
    }
    const int64_t news = allocations;
    const size_t in_use = mallinfo2().uordblks + mallinfo2().hblkhd;
    for (int i = 0; i < 5; ++i) {
      kern::moe_experts_cpu_simd(a, s);
      kern::moe_experts_cpu_simd(b, s);
    }
    EXPECT_EQ(allocations, news);
    EXPECT_EQ(mallinfo2().uordblks + mallinfo2().hblkhd, in_use);
  }
}

TEST(MoeKernel, PackedSteadyStateAllocatesNothing) {
  for (const auto& [xt, wt] : {kPairs[0], kPairs[1], kPairs[2]}) {
    SCOPED_TRACE(spec::dtype_name(wt));
    Layer big(40, 256, 80, 16, 4, 80, xt, wt), small(2, 256, 80, 16, 4, 80, xt, wt);
    const auto a = big.args(), b = small.args();
    const auto w = pack(a);
    kern::MoeScratch s;
    const auto both = [&] {
      kern::moe_experts_cpu_packed(a, w, s);
      kern::moe_experts_cpu_packed(b, w, s);
    };
    // Units are stolen: a thread may meet its first one of a kind, and so its scratch, some calls late. What a call
    // takes each time shows in every window.
    bool steady = false;
    for (int window = 0; window < 5 && !steady; ++window) {
      both();
      const int64_t news = allocations;
      const size_t in_use = mallinfo2().uordblks + mallinfo2().hblkhd;
      for (int i = 0; i < 5; ++i) both();
      // Less: threads of an earlier team have ended meanwhile.
      steady = allocations == news && mallinfo2().uordblks + mallinfo2().hblkhd <= in_use;
    }
    EXPECT_TRUE(steady);
  }
}

TEST(MoeKernel, EmptyCalls) {
  Layer l(1, 64, 32, 4, 2, 16, DType::f32, DType::f32);
  kern::MoeScratch s;
  auto a = l.args();
  a.T = 0;
  kern::moe_experts_cpu_simd(a, s);
  EXPECT_TRUE(std::isnan(get(l.y.data(), l.xt, 0)));  // nothing written
  a = l.args();
  a.K = 0;
  kern::moe_experts_cpu_simd(a, s);  // the shared expert alone
  EXPECT_FALSE(std::isnan(get(l.y.data(), l.xt, 0)));
  a = l.args();
  a.T = 0;
  cpu_packed(a, s);
  EXPECT_TRUE(std::isnan(get(l.y.data(), l.xt, 0)));
  a = l.args();
  a.K = 0;
  cpu_packed(a, s);
  EXPECT_FALSE(std::isnan(get(l.y.data(), l.xt, 0)));
}

}  // namespace
}  // namespace v3b
