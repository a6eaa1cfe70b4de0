// Counter-based random numbers: value = f(seed, stream, index), so results do not depend on thread
// count, order of evaluation or machine. Only exact IEEE operations (integer arithmetic, fma,
// divide, square root), no libm: a normal value has the same bits everywhere. Plain functions with
// internal linkage, usable from kernels and benches (DESIGN 1, rule 6).
//   rng_u64      splitmix64 finaliser applied three times to (seed, stream, index)
//   rng_uniform  [0,1), 53 bits
//   rng_below    integer in [0,n), n >= 1 (bias < n / 2^64)
//   rng_normal   N(0,1) by the inverse distribution function: Wichura's AS 241 (1988), relative
//   error ~1e-15
#pragma once
#include <cmath>
#include <cstdint>

#include "reference/spec/dtype.h"

namespace v3b::model {

struct Rng {
  uint64_t seed = 0, stream = 0;
};

V3B_HD uint64_t rng_mix(uint64_t z) {
  z += 0x9e3779b97f4a7c15ull;
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
  return z ^ (z >> 31);
}
V3B_HD uint64_t rng_u64(const Rng& r, uint64_t index) {
  return rng_mix(rng_mix(rng_mix(r.seed) ^ r.stream) ^ index);
}
V3B_HD double rng_uniform(const Rng& r, uint64_t index) {
  return static_cast<double>(rng_u64(r, index) >> 11) * 0x1p-53;
}
V3B_HD int64_t rng_below(const Rng& r, uint64_t index, int64_t n) {
  __extension__ typedef unsigned __int128 u128;
  return static_cast<int64_t>((static_cast<u128>(rng_u64(r, index)) * static_cast<u128>(n)) >> 64);
}
// 64-bit FNV-1a of a name, for one stream a tensor.
V3B_HD uint64_t rng_stream(const char* name) {
  uint64_t h = 0xcbf29ce484222325ull;
  for (; *name; ++name) h = (h ^ static_cast<unsigned char>(*name)) * 0x100000001b3ull;
  return h;
}

// Natural logarithm of x in (0,1) by atanh series, fma only: error below 1e-15.
V3B_HD double rng_log(double x) {
  const uint64_t bits = std::bit_cast<uint64_t>(x);
  int e = static_cast<int>(bits >> 52) - 1023;
  double m = std::bit_cast<double>((bits & 0xfffffffffffffull) | 0x3ff0000000000000ull);
  if (m > 1.4142135623730951) {
    m = m * 0.5;
    e += 1;
  }
  const double f = (m - 1.0) / (m + 1.0), s = f * f;
  double p = 1.0 / 21;
  for (int k = 19; k >= 1; k -= 2) p = std::fma(p, s, 1.0 / k);
  const double two_f = 2.0 * f;
  return std::fma(static_cast<double>(e), 0.69314718055994530942, two_f * p);
}

V3B_HD double rng_poly(const double* c, int n, double x) {  // c[n] x^n + ... + c[0]
  double y = c[n];
  for (int i = n - 1; i >= 0; --i) y = std::fma(y, x, c[i]);
  return y;
}
// Quantile of N(0,1) for 0 < p < 1.
V3B_HD double rng_normal_quantile(double p) {
  constexpr double a[8] = {3.3871328727963666080e0, 1.3314166789178437745e2,
                           1.9715909503065514427e3, 1.3731693765509461125e4,
                           4.5921953931549871457e4, 6.7265770927008700853e4,
                           3.3430575583588128105e4, 2.5090809287301226727e3};
  constexpr double b[8] = {1.0,
                           4.2313330701600911252e1,
                           6.8718700749205790830e2,
                           5.3941960214247511077e3,
                           2.1213794301586595867e4,
                           3.9307895800092710610e4,
                           2.8729085735721942674e4,
                           5.2264952788528545610e3};
  constexpr double c[8] = {1.42343711074968357734e0,  4.63033784615654529590e0,
                           5.76949722146069140550e0,  3.64784832476320460504e0,
                           1.27045825245236838258e0,  2.41780725177450611770e-1,
                           2.27238449892691845833e-2, 7.74545014278341407640e-4};
  constexpr double d[8] = {1.0,
                           2.05319162663775882187e0,
                           1.67638483018380384940e0,
                           6.89767334985100004550e-1,
                           1.48103976427480074590e-1,
                           1.51986665636164571966e-2,
                           5.47593808499534494600e-4,
                           1.05075007164441684324e-9};
  constexpr double e[8] = {6.65790464350110377720e0,  5.46378491116411436990e0,
                           1.78482653991729133580e0,  2.96560571828504891230e-1,
                           2.65321895265761230930e-2, 1.24266094738807843860e-3,
                           2.71155556874348757815e-5, 2.01033439929228813265e-7};
  constexpr double f[8] = {1.0,
                           5.99832206555887937690e-1,
                           1.36929880922735805310e-1,
                           1.48753612908506148525e-2,
                           7.86869131145613259100e-4,
                           1.84631831751005468180e-5,
                           1.42151175831644588870e-7,
                           2.04426310338993978564e-15};
  const double q = p - 0.5;
  if (q >= -0.425 && q <= 0.425) {
    const double r = std::fma(-q, q, 0.180625);
    return q * (rng_poly(a, 7, r) / rng_poly(b, 7, r));
  }
  const double tail = q < 0 ? p : 1.0 - p;
  const double r = std::sqrt(-rng_log(tail));
  const double r1 = r - 1.6, r2 = r - 5.0;
  const double v =
      r <= 5.0 ? rng_poly(c, 7, r1) / rng_poly(d, 7, r1) : rng_poly(e, 7, r2) / rng_poly(f, 7, r2);
  return q < 0 ? -v : v;
}
V3B_HD double rng_normal(const Rng& r, uint64_t index) {
  // 52 bits and a half: strictly inside (0,1), and 1-p is exact.
  return rng_normal_quantile((static_cast<double>(rng_u64(r, index) >> 12) + 0.5) * 0x1p-52);
}

}  // namespace v3b::model
