// reference/spec/dtype.h against a slow search over all representable values, and model/rng.h.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "model/rng.h"
#include "reference/spec/dtype.h"

using namespace v3b::spec;
using namespace v3b::model;

namespace {

bool same_bits(float a, float b) {
  return std::bit_cast<uint32_t>(a) == std::bit_cast<uint32_t>(b);
}

// The values of a small float format in double arithmetic, from its definition only.
struct Format {
  int exp_bits, man_bits, bias;
  bool has_inf;  // IEEE (inf and NaNs at the top) or E4M3FN (one NaN code, saturating)
  double value(unsigned code) const {
    const unsigned man = code & ((1u << man_bits) - 1),
                   exp = (code >> man_bits) & ((1u << exp_bits) - 1);
    const double sign = (code >> (man_bits + exp_bits)) & 1 ? -1 : 1;
    if (exp == 0) return sign * std::ldexp(man, 1 - bias - man_bits);
    const unsigned top = (1u << exp_bits) - 1;
    if (has_inf && exp == top)
      return man == 0 ? sign * std::numeric_limits<double>::infinity()
                      : std::numeric_limits<double>::quiet_NaN();
    if (!has_inf && exp == top && man == (1u << man_bits) - 1)
      return std::numeric_limits<double>::quiet_NaN();
    return sign * std::ldexp((1u << man_bits) + man, static_cast<int>(exp) - bias - man_bits);
  }
  unsigned codes() const { return 1u << (exp_bits + man_bits + 1); }
};
constexpr Format kBf16{8, 7, 127, true}, kF16{5, 10, 15, true}, kE4m3{4, 3, 7, false};

// Nearest code to x by search over the sorted non-negative values; a tie goes to the even code.
class Nearest {
 public:
  explicit Nearest(const Format& f) : f_(f) {
    for (unsigned c = 0; c < f.codes() / 2; ++c) {
      const double v = f.value(c);
      if (std::isfinite(v)) values_.push_back(v);  // ascending in the code
    }
  }
  unsigned code(float x) const {
    const unsigned sign = std::signbit(x) ? f_.codes() / 2 : 0;
    const double a = std::fabs(static_cast<double>(x));
    const auto last = static_cast<unsigned>(values_.size() - 1);
    // One step beyond the largest finite value stands for overflow: from half way on, IEEE formats
    // go to infinity.
    const double step = values_[last] - values_[last - 1];
    if (a >= values_[last] + step / 2) return sign | (f_.has_inf ? last + 1 : last);
    const auto hi = static_cast<unsigned>(std::lower_bound(values_.begin(), values_.end(), a) -
                                          values_.begin());
    if (hi > last) return sign | last;
    if (values_[hi] == a || hi == 0) return sign | hi;
    const double below = a - values_[hi - 1], above = values_[hi] - a;
    if (below != above) return sign | (below < above ? hi - 1 : hi);
    return sign | (hi % 2 == 0 ? hi : hi - 1);
  }
  const std::vector<double>& values() const { return values_; }

 private:
  const Format& f_;
  std::vector<double> values_;
};

unsigned convert(const Format& f, float x) {
  if (&f == &kBf16) return to_bf16(x).bits;
  if (&f == &kF16) return to_f16(x).bits;
  return to_f8e4m3(x).bits;
}
float widen(const Format& f, unsigned code) {
  if (&f == &kBf16) return to_float(bf16{static_cast<uint16_t>(code)});
  if (&f == &kF16) return to_float(f16{static_cast<uint16_t>(code)});
  return to_float(f8e4m3{static_cast<uint8_t>(code)});
}

void all_codes(const Format& f) {
  for (unsigned c = 0; c < f.codes(); ++c) {
    const double want = f.value(c);
    const float got = widen(f, c);
    const unsigned back = convert(f, got);
    if (std::isnan(want)) {
      ASSERT_TRUE(std::isnan(got)) << c;
      ASSERT_TRUE(std::isnan(f.value(back))) << c;
      ASSERT_EQ(back & (f.codes() / 2), c & (f.codes() / 2)) << c;  // the sign stays
    } else {
      ASSERT_TRUE(same_bits(got, static_cast<float>(want))) << c;  // -0 too
      ASSERT_EQ(static_cast<double>(got), want) << c;
      ASSERT_EQ(back, c);
    }
  }
}

// Every midpoint between neighbours, one float to either side of it, and random bit patterns.
void against_search(const Format& f) {
  const Nearest nearest(f);
  const std::vector<double>& v = nearest.values();
  auto check = [&](float x) {
    for (const float y : {x, -x}) ASSERT_EQ(convert(f, y), nearest.code(y)) << std::hexfloat << y;
  };
  for (size_t i = 0; i < v.size(); ++i) {
    const double up = i + 1 < v.size() ? v[i + 1] : v[i] + (v[i] - v[i - 1]);
    const double mid = (v[i] + up) / 2;
    const auto m =
        static_cast<float>(mid);  // inexact only among bf16's smallest: then a point near the tie
    for (const float x :
         {m, std::nextafter(m, 0.0f), std::nextafter(m, std::numeric_limits<float>::infinity())})
      check(x);
  }
  const Rng rng{7, 1};
  for (uint64_t i = 0; i < 300'000; ++i) {
    const float any = std::bit_cast<float>(static_cast<uint32_t>(rng_u64(rng, i)));
    if (!std::isnan(any)) check(any);
    check(static_cast<float>(std::ldexp(rng_uniform(rng, i), static_cast<int>(i % 60) - 40)));
  }
  const float inf = std::numeric_limits<float>::infinity();
  check(0.0f);
  check(inf);
  check(std::numeric_limits<float>::max());
  check(std::numeric_limits<float>::denorm_min());
  for (const float nan :
       {std::numeric_limits<float>::quiet_NaN(), std::bit_cast<float>(0x7f800001u),
        std::bit_cast<float>(0xffffffffu), std::bit_cast<float>(0xff800001u)})
    ASSERT_TRUE(std::isnan(widen(f, convert(f, nan))));
}

}  // namespace

TEST(DType, AllBf16Codes) { all_codes(kBf16); }
TEST(DType, AllF16Codes) { all_codes(kF16); }
TEST(DType, AllE4m3Codes) { all_codes(kE4m3); }
TEST(DType, Bf16NearestEven) { against_search(kBf16); }
TEST(DType, F16NearestEven) { against_search(kF16); }
TEST(DType, E4m3NearestEvenSaturating) { against_search(kE4m3); }

TEST(DType, E4m3GoldenCodes) {  // SPEC Appendix A
  struct {
    double x;
    unsigned code;
    double value;
  } const golden[] = {{0.3, 0x2A, 0.3125},
                      {1, 0x38, 1},
                      {1.0625, 0x38, 1},
                      {1.1875, 0x3A, 1.25},
                      {17, 0x58, 16},
                      {19, 0x5A, 20},
                      {240, 0x77, 240},
                      {447, 0x7E, 448},
                      {448, 0x7E, 448},
                      {460, 0x7E, 448},
                      {0.001, 0x01, 0x1p-9},
                      {0x1p-10, 0x00, 0},
                      {0x1.8p-10, 0x01, 0x1p-9},
                      {0.0146, 0x07, 0.013671875}};
  for (const auto& g : golden) {
    EXPECT_EQ(to_f8e4m3(static_cast<float>(g.x)).bits, g.code) << g.x;
    EXPECT_EQ(to_float(to_f8e4m3(static_cast<float>(g.x))), static_cast<float>(g.value)) << g.x;
    EXPECT_EQ(to_f8e4m3(static_cast<float>(-g.x)).bits, g.code | 0x80) << g.x;
  }
  const float inf = std::numeric_limits<float>::infinity();
  EXPECT_EQ(to_f8e4m3(inf).bits, 0x7E);
  EXPECT_EQ(to_f8e4m3(-inf).bits, 0xFE);
  EXPECT_TRUE(std::isnan(to_float(f8e4m3{0x7F})));
  EXPECT_TRUE(std::isnan(to_float(f8e4m3{0xFF})));
}

TEST(DType, ScalesAndCeilPow2) {  // SPEC Appendix A, "Scales"; bit form of SPEC 1.22
  struct {
    double amax, scale, pow2;
  } const golden[] = {{3.7, 8.258928571e-3, 0x1p-6},
                      {448, 1, 1},
                      {0.875, 0x1p-9, 0x1p-9},
                      {1e-6, 2.232142857e-7, 0x1p-22}};
  for (const auto& g : golden) {
    const float s = std::max(static_cast<float>(g.amax), 1e-4f) / 448.0f;
    EXPECT_NEAR(s / g.scale, 1, 1e-7);
    EXPECT_EQ(ceil_pow2(s), static_cast<float>(g.pow2));
  }
  for (int e = -126; e <= 126; ++e) {
    const float p = std::ldexp(1.0f, e);
    EXPECT_EQ(ceil_pow2(p), p);
    EXPECT_EQ(ceil_pow2(std::nextafter(p, 2 * p)), 2 * p);
  }
}

TEST(DType, BytesAndNames) {
  EXPECT_EQ(dtype_bytes(DType::f64), 8);
  EXPECT_EQ(dtype_bytes(DType::i64), 8);
  EXPECT_EQ(dtype_bytes(DType::f32), 4);
  EXPECT_EQ(dtype_bytes(DType::i32), 4);
  EXPECT_EQ(dtype_bytes(DType::bf16), 2);
  EXPECT_EQ(dtype_bytes(DType::f16), 2);
  EXPECT_EQ(dtype_bytes(DType::f8e4m3), 1);
  EXPECT_EQ(dtype_bytes(DType::u8), 1);
  EXPECT_STREQ(dtype_name(DType::f8e4m3), "f8e4m3");
}

TEST(Rng, FixedValues) {  // pinned: a change would silently change every input of every benchmark
  const Rng r{42, 7};
  EXPECT_EQ(rng_u64(r, 0), 0x55be888977820befull);
  EXPECT_EQ(rng_u64(r, 1), 0x383d308626efa9f0ull);
  EXPECT_EQ(std::bit_cast<uint64_t>(rng_normal(r, 0)), 0xbfdb48c5b137f991ull);
  EXPECT_EQ(std::bit_cast<uint64_t>(rng_normal(r, 12345)), 0x3fcc8a2452eee552ull);
  EXPECT_EQ(rng_stream("model.norm.weight"), 0xd6d6e5afd11604e4ull);
}

TEST(Rng, LogAndQuantileAreAccurate) {
  const Rng r{1, 2};
  for (uint64_t i = 0; i < 100'000; ++i) {
    const double x = std::ldexp(rng_uniform(r, i) + 0x1p-60, -static_cast<int>(i % 50));
    ASSERT_NEAR(rng_log(x), std::log(x), 1e-15 * std::max(1.0, std::fabs(std::log(x)))) << x;
  }
  // Phi(quantile(p)) = p, relative to the tail that is compared.
  for (int k = 1; k <= 52; ++k)
    for (const double f : {1.0, 1.3, 1.9}) {
      const double p = std::ldexp(f, -k - 1);
      const double z = rng_normal_quantile(p);
      // A relative error e of z moves Phi by about z^2 e.
      ASSERT_NEAR(0.5 * std::erfc(-z / std::sqrt(2.0)) / p, 1, (1 + z * z) * 1e-15) << p;
      if (k < 20) {
        ASSERT_NEAR(rng_normal_quantile(1 - p), -z, 1e-9 * std::fabs(z) + 1e-15) << p;
      }
    }
  EXPECT_EQ(rng_normal_quantile(0.5), 0);
}

TEST(Rng, MomentsAndIndependence) {
  const int64_t n = 1'000'000;
  double s1 = 0, s2 = 0, s3 = 0, s4 = 0, u1 = 0, lag = 0, cross = 0;
  const Rng a{3, 0}, b{3, 1};
  double previous = 0;
  int64_t hist[10] = {};
  for (int64_t i = 0; i < n; ++i) {
    const double x = rng_normal(a, static_cast<uint64_t>(i)),
                 y = rng_normal(b, static_cast<uint64_t>(i));
    s1 += x;
    s2 += x * x;
    s3 += x * x * x;
    s4 += x * x * x * x;
    lag += x * previous;
    cross += x * y;
    previous = x;
    const double u = rng_uniform(b, static_cast<uint64_t>(i));
    ASSERT_GE(u, 0);
    ASSERT_LT(u, 1);
    u1 += u;
    const int64_t k = rng_below(a, static_cast<uint64_t>(i), 10);
    ASSERT_GE(k, 0);
    ASSERT_LT(k, 10);
    ++hist[k];
  }
  const double N = static_cast<double>(n),
               sigma = 1 / std::sqrt(N);  // bounds: five standard errors
  EXPECT_NEAR(s1 / N, 0, 5 * sigma);
  EXPECT_NEAR(s2 / N, 1, 5 * sigma * std::sqrt(2.0));
  EXPECT_NEAR(s3 / N, 0, 5 * sigma * std::sqrt(15.0));
  EXPECT_NEAR(s4 / N, 3, 5 * sigma * std::sqrt(96.0));
  EXPECT_NEAR(lag / N, 0, 5 * sigma);
  EXPECT_NEAR(cross / N, 0, 5 * sigma);
  EXPECT_NEAR(u1 / N, 0.5, 5 * sigma / std::sqrt(12.0));
  for (const int64_t h : hist) EXPECT_NEAR(static_cast<double>(h) / N, 0.1, 5 * sigma * 0.3);
}
