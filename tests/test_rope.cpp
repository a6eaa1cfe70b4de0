// The small components: RoPE, RMSNorm, SwiGLU, softmax, embedding (SPEC 1.1-1.3, 1.13, Appendix A):
// golden values, identities, backwards against central differences.
#include <gtest/gtest.h>

#include <cmath>
#include <functional>

#include "model/error.h"
#include "model/rng.h"
#include "model/rope_table.h"
#include "reference/embedding.h"
#include "reference/rmsnorm.h"
#include "reference/rope.h"
#include "reference/softmax.h"
#include "reference/swiglu.h"
#include "tests/worst.h"

namespace v3b {
namespace {

using Vec = std::vector<double>;
using spec::RopeForm;

Vec randoms(int64_t n, uint64_t seed) {
  Vec v(static_cast<size_t>(n));
  for (int64_t i = 0; i < n; ++i) v[size_t(i)] = model::rng_normal({seed, 5}, uint64_t(i));
  return v;
}
double dot(const Vec& a, const Vec& b) {
  double s = 0;
  for (size_t i = 0; i < a.size(); ++i) s += a[i] * b[i];
  return s;
}
// d<w, f(x)>/dx by central differences against `analytic`.
void expect_gradient(Vec x, const std::function<Vec(const Vec&)>& f, const Vec& w,
                     const Vec& analytic) {
  constexpr double h = 1e-6;
  ASSERT_EQ(x.size(), analytic.size());
  for (size_t i = 0; i < x.size(); ++i) {
    const double keep = x[i];
    x[i] = keep + h;
    const double up = dot(f(x), w);
    x[i] = keep - h;
    const double down = dot(f(x), w);
    x[i] = keep;
    const double numeric = (up - down) / (2 * h);
    EXPECT_TRUE(std::abs(numeric - analytic[i]) <=
                1e-6 * std::max(std::abs(numeric), std::abs(analytic[i])) + 1e-8)
        << i << ": " << numeric << " against " << analytic[i];
  }
}

model::ModelConfig rope_config(model::RopeType type, double factor) {
  model::ModelConfig c = model::load_preset("v3");
  c.rope_scaling.type = type;
  c.rope_scaling.factor = factor;
  return c;
}
struct Table {
  Vec cos, sin;
};
Table table(const model::RopeFreqs& f, int64_t first, int64_t n) {
  Table t;
  t.cos.resize(size_t(n) * f.inv_freq.size());
  t.sin.resize(t.cos.size());
  ref::rope_table<double>(f, first, n, t.cos.data(), t.sin.data());
  return t;
}
// One vector at one position.
Vec rotate(const model::RopeFreqs& f, int64_t p, const Vec& x,
           RopeForm form = RopeForm::interleaved, bool inverse = false) {
  const Table t = table(f, p, 1);
  Vec y(x.size());
  ref::rope<double>(1, 1, int64_t(x.size()), form, inverse, x.data(), t.cos.data(), t.sin.data(),
                    y.data());
  return y;
}

TEST(Rope, GoldenValuesOfAppendixA) {
  const model::RopeFreqs f = model::rope_freqs(model::load_preset("v3"), {}, 163840);
  Vec x(64, 0.0);
  for (int i = 0; i < 64; i += 2) x[size_t(i)] = 1;  // every pair is (1, 0)
  const Vec y = rotate(f, 5, x);
  EXPECT_NEAR(y[0], 0.2836621855, 5e-11);
  EXPECT_NEAR(y[1], -0.9589242747, 5e-11);
  EXPECT_NEAR(y[32], 0.9996218988, 5e-11);  // pair 16 with YaRN
  EXPECT_NEAR(y[33], 0.0274965340, 5e-11);
}

TEST(Rope, Identities) {
  const model::RopeFreqs f = model::rope_freqs(rope_config(model::RopeType::none, 1), {}, 4096);
  const Vec q = randoms(64, 1), k = randoms(64, 2);
  const Vec zero = rotate(f, 0, q);
  for (size_t i = 0; i < 64; ++i) EXPECT_EQ(zero[i], q[i]);
  for (RopeForm form : {RopeForm::interleaved, RopeForm::interleaved_to_half, RopeForm::half}) {
    const Vec y = rotate(f, 1234, q, form);
    EXPECT_NEAR(dot(y, y), dot(q, q), 1e-12 * dot(q, q));
    const Vec back = rotate(f, 1234, y, form, true);
    for (size_t i = 0; i < 64; ++i) EXPECT_NEAR(back[i], q[i], 1e-14);
    // <R_p q, R_j k> depends on p - j only.
    const double a = dot(rotate(f, 17, q, form), rotate(f, 3, k, form));
    for (int64_t shift : {1, 98, 3000})
      EXPECT_NEAR(dot(rotate(f, 17 + shift, q, form), rotate(f, 3 + shift, k, form)), a, 1e-11);
  }
  // Scores do not depend on the layout.
  EXPECT_NEAR(dot(rotate(f, 40, q), rotate(f, 8, k)),
              dot(rotate(f, 40, q, RopeForm::interleaved_to_half),
                  rotate(f, 8, k, RopeForm::interleaved_to_half)),
              1e-12);
}

// out_HF[i] = out_OFF[2i], out_HF[i + 32] = out_OFF[2i + 1], exactly (SPEC 1.3).
TEST(Rope, HalfSplitIsThePermutedInterleaved) {
  const model::RopeFreqs f = model::rope_freqs(model::load_preset("v3"), {}, 4096);
  const Vec q = randoms(64, 3);
  const Vec off = rotate(f, 777, q), hf = rotate(f, 777, q, RopeForm::interleaved_to_half);
  Vec permuted(64);
  for (size_t i = 0; i < 32; ++i) {
    EXPECT_EQ(hf[i], off[2 * i]);
    EXPECT_EQ(hf[i + 32], off[2 * i + 1]);
    permuted[i] = q[2 * i], permuted[i + 32] = q[2 * i + 1];
  }
  const Vec half = rotate(f, 777, permuted, RopeForm::half);
  for (size_t i = 0; i < 64; ++i) EXPECT_EQ(half[i], hf[i]);
}

TEST(Rope, PositionInterpolationStretchesPositions) {
  const model::RopeFreqs base = model::rope_freqs(rope_config(model::RopeType::none, 1), {}, 4096);
  const model::RopeFreqs pi = model::rope_freqs(rope_config(model::RopeType::linear, 8), {}, 4096);
  const Vec q = randoms(64, 4);
  const Vec a = rotate(base, 100, q), b = rotate(pi, 800, q);
  for (size_t i = 0; i < 64; ++i) EXPECT_NEAR(a[i], b[i], 1e-12);
}

// Tables built in float32 arithmetic are off by up to 2e-2 at 160K and 1e-3 at 4K; ours, built in
// float64, are not.
TEST(Rope, TablesAreBuiltInDouble) {
  const model::RopeFreqs f = model::rope_freqs(rope_config(model::RopeType::none, 1), {}, 163840);
  const auto worst = [&](int64_t p) {
    const model::RopeTable t = model::make_rope_table(f, p, 1);
    double ours = 0, single = 0;
    for (size_t i = 0; i < f.inv_freq.size(); ++i) {
      const double exact = std::cos(double(p) * f.inv_freq[i]);
      ours = worse(ours, std::abs(t.cos[i] - exact));
      const float angle = static_cast<float>(p) * static_cast<float>(f.inv_freq[i]);
      single = std::max(single, std::abs(std::cos(double(angle)) - exact));
    }
    EXPECT_LE(ours, 3.1e-8);
    return single;
  };
  EXPECT_LE(worst(4095), 1e-3);
  const double far = worst(163839);
  EXPECT_LE(far, 2e-2);
  EXPECT_GT(far, 1e-3);  // the danger is real
}

TEST(Rope, BackwardIsTheInverse) {
  const model::RopeFreqs f = model::rope_freqs(rope_config(model::RopeType::none, 1), {}, 4096);
  for (RopeForm form : {RopeForm::interleaved, RopeForm::interleaved_to_half, RopeForm::half}) {
    const Vec x = randoms(8, 5), w = randoms(8, 6);
    model::RopeFreqs small = f;
    small.inv_freq.resize(4);
    const auto forward = [&](const Vec& v) { return rotate(small, 29, v, form); };
    expect_gradient(x, forward, w, rotate(small, 29, w, form, true));
  }
}

TEST(RmsNorm, GoldenValues) {
  const Vec x{1, 2, 3, 4}, w(4, 1.0), want{0.3651483473, 0.7302966947, 1.0954450420, 1.4605933893};
  Vec y(4);
  ref::rmsnorm<double>(1, 4, 1e-6, x.data(), w.data(), y.data());
  for (size_t i = 0; i < 4; ++i) EXPECT_NEAR(y[i], want[i], 5e-11);
}

TEST(RmsNorm, Identities) {
  const Vec x = randoms(96, 7), w(96, 1.0);
  Vec y(96), z(96);
  ref::rmsnorm<double>(1, 96, 1e-6, x.data(), w.data(), y.data());
  const double ms = dot(x, x) / 96;
  EXPECT_NEAR(dot(y, y) / 96, 1 - 1e-6 / (ms + 1e-6), 1e-13);
  ref::rmsnorm<double>(1, 96, 1e-6, y.data(), w.data(), z.data());  // idempotent to eps
  for (size_t i = 0; i < 96; ++i) EXPECT_NEAR(z[i], y[i], 1e-6 * 4);
  Vec big(96);
  for (size_t i = 0; i < 96; ++i) big[i] = 1e4 * x[i];
  ref::rmsnorm<double>(1, 96, 0.0, x.data(), w.data(), y.data());
  ref::rmsnorm<double>(1, 96, 0.0, big.data(), w.data(), z.data());
  for (size_t i = 0; i < 96; ++i) EXPECT_NEAR(z[i], y[i], 1e-13);
}

TEST(RmsNorm, Backward) {
  const Vec x = randoms(12, 8), w = randoms(6, 9), dy = randoms(12, 10);
  Vec dx(12), dw(6, 0.0);
  ref::rmsnorm_backward<double>(2, 6, 1e-6, x.data(), w.data(), dy.data(), dx.data(), dw.data());
  const auto of = [&](const Vec& a, const Vec& b) {
    Vec y(12);
    ref::rmsnorm<double>(2, 6, 1e-6, a.data(), b.data(), y.data());
    return y;
  };
  expect_gradient(
      x, [&](const Vec& v) { return of(v, w); }, dy, dx);
  expect_gradient(
      w, [&](const Vec& v) { return of(x, v); }, dy, dw);
}

TEST(Swiglu, GoldenValuesAndLimits) {
  EXPECT_NEAR(ref::silu(1.0), 0.7310585786, 5e-11);
  EXPECT_NEAR(ref::silu(-20.0), -4.122307e-8, 5e-14);
  EXPECT_EQ(ref::silu(1e4), 1e4);
  EXPECT_EQ(ref::silu(-1e4), 0);
  EXPECT_TRUE(std::isnan(ref::silu(std::nan(""))));
}

TEST(Swiglu, Backward) {
  const Vec g = randoms(10, 11), u = randoms(10, 12), dy = randoms(10, 13);
  Vec dg(10), du(10);
  ref::swiglu_backward<double>(2, 5, g.data(), u.data(), dy.data(), dg.data(), du.data());
  const auto of = [](const Vec& a, const Vec& b) {
    Vec y(a.size());
    ref::swiglu<double>(2, 5, a.data(), b.data(), y.data());
    return y;
  };
  expect_gradient(
      g, [&](const Vec& v) { return of(v, u); }, dy, dg);
  expect_gradient(
      u, [&](const Vec& v) { return of(g, v); }, dy, du);
}

TEST(Softmax, RowsAndBackward) {
  const Vec x = randoms(14, 14), dy = randoms(14, 15);
  Vec y(14), lse(2), dx(14);
  ref::softmax<double>(2, 7, 0.7, x.data(), y.data(), lse.data());
  for (size_t t = 0; t < 2; ++t) {
    double sum = 0, direct = 0;
    for (size_t i = 0; i < 7; ++i) sum += y[7 * t + i], direct += std::exp(0.7 * x[7 * t + i]);
    EXPECT_NEAR(sum, 1, 1e-14);
    EXPECT_NEAR(lse[t], std::log(direct), 1e-14);
  }
  Vec shifted = x;
  for (double& v : shifted) v += 500;  // a constant on every score changes nothing
  Vec z(14);
  ref::softmax<double>(2, 7, 0.7, shifted.data(), z.data());
  for (size_t i = 0; i < 14; ++i) EXPECT_NEAR(z[i], y[i], 1e-12);
  ref::softmax_backward<double>(2, 7, 0.7, y.data(), dy.data(), dx.data());
  expect_gradient(
      x,
      [](const Vec& v) {
        Vec p(v.size());
        ref::softmax<double>(2, 7, 0.7, v.data(), p.data());
        return p;
      },
      dy, dx);
}

TEST(Softmax, CrossEntropyIgnoresAndDifferentiates) {
  const Vec x = randoms(15, 16);
  const int32_t labels[3] = {4, -100, 0};
  Vec d(15);
  int64_t valid = 0;
  (void)ref::cross_entropy_sum<double>(3, 5, x.data(), labels, 0.5, d.data(), &valid);
  EXPECT_EQ(valid, 2);
  for (size_t i = 5; i < 10; ++i) EXPECT_EQ(d[i], 0);
  expect_gradient(
      x,
      [&](const Vec& v) {
        return Vec{ref::cross_entropy_sum<double>(3, 5, v.data(), labels, 1, nullptr)};
      },
      Vec{0.5}, d);
  const Vec flat(5, 3.0);
  const int32_t one = 2;
  EXPECT_NEAR(ref::cross_entropy_sum<double>(1, 5, flat.data(), &one, 1, nullptr), std::log(5),
              1e-15);
}

TEST(Embedding, GatherScatterAndRange) {
  const Vec table = randoms(12, 17);  // [4, 3]
  const int32_t ids[3] = {2, 0, 2};
  Vec y(9), g(12, 0.0);
  ref::embedding<double>(3, 3, 4, ids, table.data(), y.data());
  for (size_t i = 0; i < 3; ++i) {
    EXPECT_EQ(y[i], table[6 + i]);
    EXPECT_EQ(y[3 + i], table[i]);
  }
  ref::embedding_backward<double>(3, 3, ids, y.data(), g.data());
  EXPECT_EQ(g[6], 2 * table[6]);
  EXPECT_EQ(g[3], 0);
  const int32_t bad[2] = {1, 4};
  try {
    ref::embedding<double>(2, 3, 4, bad, table.data(), y.data());
    FAIL() << "an id out of range was taken";
  } catch (const Error& e) {
    EXPECT_EQ(e.code(), ExitCode::bad_input);
    EXPECT_NE(std::string(e.what()).find("position 1"), std::string::npos);
  }
}

}  // namespace
}  // namespace v3b
