// Identities of attention, MLA and the latent cache (SPEC 1.5, 1.7-1.9, 3.3) on the reference in
// float64.
#include <gtest/gtest.h>

#include <Eigen/Core>
#include <algorithm>
#include <cmath>
#include <cstring>
#include <functional>
#include <limits>
#include <random>
#include <vector>

#include "reference/attention.h"
#include "reference/kv_cache.h"
#include "reference/mla.h"
#include "reference/spec/attention.h"
#include "tests/normals.h"

namespace v3b::ref {
namespace {

using Vec = std::vector<double>;
constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();

// ||a - b|| / ||b||; NaN stays NaN, so that EXPECT_LE fails on it.
double rel(const Vec& a, const Vec& b) {
  EXPECT_EQ(a.size(), b.size());
  double num = 0, den = 0;
  for (size_t i = 0; i < a.size(); ++i) num += (a[i] - b[i]) * (a[i] - b[i]), den += b[i] * b[i];
  return std::sqrt(num) / std::max(std::sqrt(den), 1e-300);
}
struct Result {
  Vec o, lse;
};
Result run(const AttentionShape& a, const Vec& q, const Vec& k, const Vec& v) {
  Result r{Vec(a.T * a.n_h * a.d_v, kNaN), Vec(a.T * a.n_h, kNaN)};
  attention_core(a, q.data(), k.data(), v.data(), r.o.data(), r.lse.data());
  return r;
}
AttentionShape shape(int64_t T, int64_t s0, int64_t n_h, int64_t n_kv, int64_t d_qk, int64_t d_v) {
  return {.T = T,
          .s0 = s0,
          .n_h = n_h,
          .n_kv = n_kv,
          .d_qk = d_qk,
          .d_v = d_v,
          .scale = mla_scale(d_qk)};
}

TEST(AttentionReference, AgreesWithScalarLoops) {
  const AttentionShape a = shape(5, 3, 4, 2, 6, 4);
  const Vec q = normals(5 * 4 * 6, 1), k = normals(8 * 2 * 6, 2), v = normals(8 * 2 * 4, 3);
  const Result r = run(a, q, k, v);
  for (int64_t i = 0; i < 5; ++i)
    for (int64_t h = 0; h < 4; ++h) {
      const int64_t g = h / 2, n = 3 + i + 1;
      Vec p(n);
      double sum = 0;
      for (int64_t j = 0; j < n; ++j) {
        double dot = 0;
        for (int64_t c = 0; c < 6; ++c) dot += q[(i * 4 + h) * 6 + c] * k[(j * 2 + g) * 6 + c];
        sum += p[j] = std::exp(a.scale * dot);
      }
      EXPECT_NEAR(r.lse[i * 4 + h], std::log(sum), 1e-12);
      for (int64_t c = 0; c < 4; ++c) {
        double o = 0;
        for (int64_t j = 0; j < n; ++j) o += p[j] / sum * v[(j * 2 + g) * 4 + c];
        EXPECT_NEAR(r.o[(i * 4 + h) * 4 + c], o, 1e-12);
      }
    }
}

TEST(AttentionReference, GqaWithDuplicatedHeadsIsMhaAndMqaIsGqa1) {
  const int64_t T = 9, n_h = 6, d = 8;
  const Vec q = normals(T * n_h * d, 1);
  for (const int64_t n_kv : {1, 2, 3}) {
    const Vec k = normals(T * n_kv * d, 2), v = normals(T * n_kv * d, 3);
    Vec kk(T * n_h * d), vv(T * n_h * d);
    for (int64_t t = 0; t < T; ++t)
      for (int64_t h = 0; h < n_h; ++h)
        for (int64_t c = 0; c < d; ++c) {
          kk[(t * n_h + h) * d + c] = k[(t * n_kv + h * n_kv / n_h) * d + c];
          vv[(t * n_h + h) * d + c] = v[(t * n_kv + h * n_kv / n_h) * d + c];
        }
    EXPECT_LE(rel(run(shape(T, 0, n_h, n_kv, d, d), q, k, v).o,
                  run(shape(T, 0, n_h, n_h, d, d), q, kk, vv).o),
              1e-12);
  }
}

TEST(AttentionReference, RowSumsAreOneAndShiftDoesNotMatter) {
  const int64_t T = 7, n_h = 2, d = 5;
  AttentionShape a = shape(T, 4, n_h, n_h, d, 1);
  const Vec q = normals(T * n_h * d, 1), k = normals((T + 4) * n_h * d, 2),
            ones((T + 4) * n_h, 1.0);
  for (double o : run(a, q, k, ones).o) EXPECT_NEAR(o, 1.0, 1e-12);
  // A constant added to every score of a row: an extra dimension where q is 3 and k is 1.
  a.d_v = d;
  const Vec v = normals((T + 4) * n_h * d, 3);
  AttentionShape b = a;
  b.d_qk = d + 1;
  Vec q1, k1;
  for (int64_t r = 0; r < T * n_h; ++r) {
    q1.insert(q1.end(), q.begin() + r * d, q.begin() + (r + 1) * d);
    q1.push_back(3.0);
  }
  for (int64_t r = 0; r < (T + 4) * n_h; ++r) {
    k1.insert(k1.end(), k.begin() + r * d, k.begin() + (r + 1) * d);
    k1.push_back(1.0);
  }
  const Result x = run(a, q, k, v), y = run(b, q1, k1, v);
  EXPECT_LE(rel(y.o, x.o), 1e-12);
  for (size_t i = 0; i < x.lse.size(); ++i) EXPECT_NEAR(y.lse[i], x.lse[i] + 3.0 * a.scale, 1e-12);
}

TEST(AttentionReference, SplitKvMergeIsTheWhole) {
  const int64_t n_h = 3, d = 8, s = 37;
  const Vec q = normals(n_h * d, 1), k = normals(s * n_h * d, 2), v = normals(s * n_h * d, 3);
  const Result whole = run(shape(1, s - 1, n_h, n_h, d, d), q, k, v);
  Vec o_parts, lse_parts;
  const std::vector<int64_t> cuts = {0, 1, 20, 20, 37};  // the third part is empty
  for (size_t p = 0; p + 1 < cuts.size(); ++p) {
    const int64_t n = cuts[p + 1] - cuts[p];
    const Vec kp(k.begin() + cuts[p] * n_h * d, k.begin() + cuts[p + 1] * n_h * d);
    const Vec vp(v.begin() + cuts[p] * n_h * d, v.begin() + cuts[p + 1] * n_h * d);
    const Result r = run(shape(1, n - 1, n_h, n_h, d, d), q, kp, vp);
    o_parts.insert(o_parts.end(), r.o.begin(), r.o.end());
    lse_parts.insert(lse_parts.end(), r.lse.begin(), r.lse.end());
  }
  Vec o(n_h * d, kNaN), lse(n_h, kNaN);
  attention_merge<double>(4, n_h, d, o_parts.data(), lse_parts.data(), o.data(), lse.data());
  EXPECT_LE(rel(o, whole.o), 1e-12);
  EXPECT_LE(rel(lse, whole.lse), 1e-12);
}

TEST(AttentionReference, EmptyRowsByFlag) {
  for (const auto flag : {spec::EmptyLse::pos_inf, spec::EmptyLse::neg_inf}) {
    AttentionShape a = shape(3, -2, 2, 1, 4, 4);  // one key; queries 0 and 1 see nothing
    a.empty_lse = flag;
    const Result r = run(a, normals(24, 1), normals(4, 2), normals(4, 3));
    for (int64_t i = 0; i < 4; ++i) EXPECT_EQ(r.lse[i], empty_lse_value<double>(flag));
    for (int64_t i = 0; i < 16; ++i) EXPECT_EQ(r.o[i], 0.0);
    EXPECT_TRUE(std::isfinite(r.lse[4]) && std::isfinite(r.o[16]));
    Vec o(8, kNaN), lse(2, kNaN);
    const Vec parts(8, 0.0), infinite(2, empty_lse_value<double>(flag));
    attention_merge<double>(1, 2, 4, parts.data(), infinite.data(), o.data(), lse.data(), flag);
    EXPECT_EQ(lse[0], empty_lse_value<double>(flag));
    EXPECT_EQ(o[7], 0.0);
  }
}

TEST(AttentionReference, ChunkedIsWholeAndDecodeIsTheLastRow) {
  const int64_t T = 300, n_h = 2, d = 6;  // longer than the query block of the reference
  const Vec q = normals(T * n_h * d, 1), k = normals(T * n_h * d, 2), v = normals(T * n_h * d, 3);
  const Result whole = run(shape(T, 0, n_h, n_h, d, d), q, k, v);
  Vec o;
  for (int64_t at = 0; at < T;) {
    const int64_t n = std::min<int64_t>(at % 3 == 0 ? 130 : 41, T - at);
    const Vec qc(q.begin() + at * n_h * d, q.begin() + (at + n) * n_h * d);
    const Result r = run(shape(n, at, n_h, n_h, d, d), qc, k, v);
    o.insert(o.end(), r.o.begin(), r.o.end());
    at += n;
  }
  EXPECT_LE(rel(o, whole.o), 1e-12);
  const Vec last(q.end() - n_h * d, q.end()), expect(whole.o.end() - n_h * d, whole.o.end());
  EXPECT_LE(rel(run(shape(1, T - 1, n_h, n_h, d, d), last, k, v).o, expect), 1e-12);
}

TEST(AttentionReference, ScaleConstants) {
  EXPECT_NEAR(mla_scale(192, 0.1 * std::log(40.0) + 1), 0.1352337788608801, 1e-16);  // V3
  EXPECT_NEAR(mla_scale(192), 1 / std::sqrt(192.0), 1e-16);
}

TEST(AttentionReference, RoundedProbabilitiesStayNear) {
  AttentionShape a = shape(20, 0, 2, 2, 16, 16);
  const Vec q = normals(640, 1), k = normals(640, 2), v = normals(640, 3);
  const Result exact = run(a, q, k, v);
  a.p_dtype = spec::DType::bf16;
  const double err = rel(run(a, q, k, v).o, exact.o);
  EXPECT_LE(err, 3e-3);
  EXPECT_GT(err, 1e-5);
}

// ---- backward
// ------------------------------------------------------------------------------------------

// Central differences of sum(w * f(x)) at up to 40 places of x against `grad`.
void expect_gradient(Vec& x, const Vec& grad, const std::function<double()>& loss) {
  double biggest = 0;
  for (double g : grad) biggest = std::max(biggest, std::abs(g));
  const size_t step = std::max<size_t>(1, x.size() / 40);
  for (size_t i = 0; i < x.size(); i += step) {
    const double keep = x[i], h = 1e-6;
    x[i] = keep + h;
    const double up = loss();
    x[i] = keep - h;
    const double down = loss();
    x[i] = keep;
    EXPECT_NEAR(grad[i], (up - down) / (2 * h), 1e-6 * biggest + 1e-8) << "at " << i;
  }
}
double dot(const Vec& a, const Vec& b) {
  double s = 0;
  for (size_t i = 0; i < a.size(); ++i) s += a[i] * b[i];
  return s;
}

TEST(AttentionReference, BackwardAgainstCentralDifferences) {
  for (const auto& a :
       {shape(7, 0, 4, 4, 5, 3), shape(6, 3, 4, 2, 5, 3), shape(4, -2, 2, 1, 5, 3)}) {
    const int64_t s = a.s();
    Vec q = normals(a.T * a.n_h * a.d_qk, 1), k = normals(s * a.n_kv * a.d_qk, 2),
        v = normals(s * a.n_kv * a.d_v, 3);
    const Vec w = normals(a.T * a.n_h * a.d_v, 4);
    Vec dq(q.size(), kNaN), dk(k.size(), kNaN), dv(v.size(), kNaN);
    attention_core_backward(a, q.data(), k.data(), v.data(), w.data(), dq.data(), dk.data(),
                            dv.data());
    const auto loss = [&] { return dot(run(a, q, k, v).o, w); };
    expect_gradient(q, dq, loss);
    expect_gradient(k, dk, loss);
    expect_gradient(v, dv, loss);
  }
}

// ---- MLA
// -----------------------------------------------------------------------------------------------

struct Mla {
  MlaShape m{.n_h = 4, .d_n = 6, .d_r = 4, .d_v = 5, .d_c = 12};
  int64_t s = 21;
  Vec w = normals(m.n_h * (m.d_n + m.d_v) * m.d_c, 11, 0.3), c = normals(s * m.d_c, 12),
      pe = normals(s * m.d_r, 13), q = normals(s * m.n_h * m.d_qk(), 14);
  double scale = mla_scale(m.d_qk(), 1.2);

  Vec expanded(int64_t T) const {  // the last T queries
    Vec k(s * m.n_h * m.d_qk()), v(s * m.n_h * m.d_v);
    mla_expand(m, s, c.data(), pe.data(), w.data(), k.data(), v.data());
    AttentionShape a = shape(T, s - T, m.n_h, m.n_h, m.d_qk(), m.d_v);
    a.scale = scale;
    return run(a, Vec(q.end() - T * m.n_h * m.d_qk(), q.end()), k, v).o;
  }
  Vec kv() const {
    Vec r;
    for (int64_t j = 0; j < s; ++j) {
      r.insert(r.end(), c.begin() + j * m.d_c, c.begin() + (j + 1) * m.d_c);
      r.insert(r.end(), pe.begin() + j * m.d_r, pe.begin() + (j + 1) * m.d_r);
    }
    return r;
  }
  Vec absorbed_q(int64_t T) const {
    Vec qa(T * m.n_h * (m.d_c + m.d_r));
    mla_absorb_q(m, T, q.data() + (s - T) * m.n_h * m.d_qk(), w.data(), qa.data());
    return qa;
  }
  Vec absorbed(int64_t T) const {
    Vec lat(T * m.n_h * m.d_c), o(T * m.n_h * m.d_v, kNaN);
    mla_latent_core(T, s - T, m.n_h, m.d_c, m.d_r, scale, absorbed_q(T).data(), kv().data(),
                    lat.data());
    mla_unabsorb(m, T, lat.data(), w.data(), o.data());
    return o;
  }
};

TEST(MlaReference, AbsorbedIsExpanded) {
  const Mla x;
  for (const int64_t T : {int64_t{1}, int64_t{2}, x.s})
    EXPECT_LE(rel(x.absorbed(T), x.expanded(T)), 1e-12);
}

TEST(MlaReference, DecodeIsTheLastRowOfPrefill) {
  const Mla x;
  const Vec all = x.expanded(x.s);
  EXPECT_LE(rel(x.absorbed(1), Vec(all.end() - x.m.n_h * x.m.d_v, all.end())), 1e-12);
}

TEST(MlaReference, PermutedHeadsPermuteTheResult) {
  const Mla x;
  Mla y = x;
  const std::vector<int64_t> order = {2, 0, 3, 1};
  const int64_t wh = (x.m.d_n + x.m.d_v) * x.m.d_c, qh = x.m.d_qk();
  for (int64_t h = 0; h < 4; ++h) {
    std::copy_n(x.w.begin() + order[h] * wh, wh, y.w.begin() + h * wh);
    for (int64_t t = 0; t < x.s; ++t)
      std::copy_n(x.q.begin() + (t * 4 + order[h]) * qh, qh, y.q.begin() + (t * 4 + h) * qh);
  }
  const Vec a = x.absorbed(3), b = y.absorbed(3);
  for (int64_t t = 0; t < 3; ++t)
    for (int64_t h = 0; h < 4; ++h)
      for (int64_t c = 0; c < x.m.d_v; ++c)
        EXPECT_NEAR(b[(t * 4 + h) * x.m.d_v + c], a[(t * 4 + order[h]) * x.m.d_v + c], 1e-12);
}

TEST(MlaReference, ExpandBackwardAgainstCentralDifferences) {
  Mla x;
  const Vec wk = normals(x.s * x.m.n_h * x.m.d_qk(), 31), wv = normals(x.s * x.m.n_h * x.m.d_v, 32);
  Vec dc(x.c.size(), kNaN), dpe(x.pe.size(), kNaN), dw(x.w.size(), 0.0);
  mla_expand_backward(x.m, x.s, x.c.data(), x.w.data(), wk.data(), wv.data(), dc.data(), dpe.data(),
                      dw.data());
  const auto loss = [&] {
    Vec k(wk.size()), v(wv.size());
    mla_expand(x.m, x.s, x.c.data(), x.pe.data(), x.w.data(), k.data(), v.data());
    return dot(k, wk) + dot(v, wv);
  };
  expect_gradient(x.c, dc, loss);
  expect_gradient(x.pe, dpe, loss);
  expect_gradient(x.w, dw, loss);
}

// ---- paged cache
// ---------------------------------------------------------------------------------------

// Lays the rows of `kv` into pages of a random order; everything else is NaN, unused block ids
// absurd.
struct Paged {
  MlaPagedShape shape;
  Vec cache;
  std::vector<int32_t> table, seqlens;
};
Paged pages(const std::vector<Vec>& sequences, int64_t d, int64_t page, int64_t s_q,
            uint64_t seed) {
  Paged p;
  const int64_t B = static_cast<int64_t>(sequences.size());
  int64_t needed = 0, longest = 0;
  for (const Vec& kv : sequences) {
    const int64_t s = static_cast<int64_t>(kv.size()) / d, blocks = (s + page - 1) / page;
    p.seqlens.push_back(static_cast<int32_t>(s));
    needed += blocks;
    longest = std::max(longest, blocks);
  }
  p.shape = {
      .B = B, .s_q = s_q, .n_h = 1, .d_c = 0, .d_r = 0, .page = page, .max_blocks = longest + 2};
  std::vector<int32_t> ids(needed + 3);
  for (size_t i = 0; i < ids.size(); ++i) ids[i] = static_cast<int32_t>(i);
  std::shuffle(ids.begin(), ids.end(), std::mt19937_64(seed));
  p.cache.assign(ids.size() * page * d, kNaN);
  p.table.assign(B * p.shape.max_blocks, std::numeric_limits<int32_t>::min());
  size_t next = 0;
  for (int64_t b = 0; b < B; ++b)
    for (int64_t j = 0; j < p.seqlens[b]; ++j) {
      int32_t& id = p.table[b * p.shape.max_blocks + j / page];
      if (j % page == 0) id = ids[next++];
      std::copy_n(sequences[b].begin() + j * d, d, p.cache.begin() + (id * page + j % page) * d);
    }
  return p;
}

TEST(MlaReference, PagedIsContiguousBitwise) {
  const int64_t n_h = 3, d_c = 8, d_r = 4, d = d_c + d_r;
  const double scale = 0.3;
  for (const int64_t s_q : {1, 2}) {
    std::vector<Vec> sequences;
    for (const int64_t s : {70, 0, 1, 64, 129, 17}) sequences.push_back(normals(s * d, 100 + s));
    const int64_t B = static_cast<int64_t>(sequences.size());
    const Vec q = normals(B * s_q * n_h * d, 7);
    Vec expect_o, expect_lse;
    for (int64_t b = 0; b < B; ++b) {
      const int64_t s = static_cast<int64_t>(sequences[b].size()) / d;
      Vec o(s_q * n_h * d_c), lse(s_q * n_h);
      // Eigen sums small products in an order that depends on the address: the same alignment on both sides.
      const std::vector<double, Eigen::aligned_allocator<double>> rows(sequences[b].begin(),
                                                                       sequences[b].end());
      mla_latent_core(s_q, s - s_q, n_h, d_c, d_r, scale, q.data() + b * s_q * n_h * d, rows.data(),
                      o.data(), lse.data());
      expect_o.insert(expect_o.end(), o.begin(), o.end());
      for (int64_t h = 0; h < n_h; ++h)
        for (int64_t i = 0; i < s_q; ++i) expect_lse.push_back(lse[i * n_h + h]);
    }
    for (const int64_t page : {1, 16, 64})
      for (const uint64_t seed : {1, 2}) {
        Paged p = pages(sequences, d, page, s_q, seed);
        p.shape.n_h = n_h, p.shape.d_c = d_c, p.shape.d_r = d_r, p.shape.scale = scale;
        Vec o(expect_o.size(), kNaN), lse(expect_lse.size(), kNaN);
        mla_decode_paged(p.shape, q.data(), p.cache.data(), p.table.data(), p.seqlens.data(),
                         o.data(), lse.data());
        // Equal to the last bit; the zero of a row that sees no key may have either sign.
        for (size_t i = 0; i < o.size(); ++i)
          EXPECT_TRUE(o[i] == expect_o[i]) << "page " << page << " element " << i;
        EXPECT_EQ(0, std::memcmp(lse.data(), expect_lse.data(), lse.size() * sizeof(double)));
      }
    // seqlen 0 gives zeros and +inf
    for (int64_t i = 0; i < s_q * n_h * d_c; ++i) EXPECT_EQ(expect_o[s_q * n_h * d_c + i], 0.0);
    EXPECT_EQ(expect_lse[s_q * n_h], std::numeric_limits<double>::infinity());
  }
}

TEST(KvRecord, SizesAndScales) {
  using enum spec::KvFormat;
  EXPECT_EQ(spec::mla_cache_row_bytes(fp8_656_pow2, spec::DType::bf16, 512, 64), 656);
  EXPECT_EQ(spec::mla_cache_row_bytes(bf16, spec::DType::bf16, 512, 64), 1152);
  EXPECT_EQ(spec::mla_cache_row_bytes(bf16, spec::DType::bf16, 512, 64) * 61, 70272);
  EXPECT_EQ(spec::mla_cache_row_bytes(fp8_656_pow2, spec::DType::bf16, 512, 64) * 61, 40016);
  EXPECT_EQ(spec::mla_cache_row_bytes(fp8_656_pow2, spec::DType::bf16, 160, 32), 160 + 8 + 64);
  EXPECT_EQ(kv_tile_scale(3.7f, fp8_656_pow2), 0x1p-6f);
  EXPECT_NEAR(kv_tile_scale(3.7f, fp8_656_free), 8.258928571e-3, 4.7e-10);  // half an fp32 ulp
  EXPECT_EQ(kv_tile_scale(448.0f, fp8_656_pow2), 1.0f);
  EXPECT_EQ(kv_tile_scale(0.875f, fp8_656_pow2), 0x1p-9f);
  EXPECT_EQ(kv_tile_scale(1e-6f, fp8_656_free), 1e-4f);    // a is clamped, SPEC 1.9
  EXPECT_EQ(kv_tile_scale(0.0f, fp8_656_pow2), 0x1p-13f);  // 2^ceil(log2 1e-4)
}

TEST(KvRecord, RoundTripNoiseAndBitPatterns) {
  for (const int64_t d_c : {512, 160, 32}) {
    const int64_t d_r = 16, T = 64;
    const Vec c = normals(T * d_c, 1), pe = normals(T * d_r, 2);
    for (const auto format : {spec::KvFormat::fp8_656_pow2, spec::KvFormat::fp8_656_free}) {
      const int64_t bytes = spec::mla_cache_row_bytes(format, spec::DType::bf16, d_c, d_r);
      std::vector<uint8_t> record(bytes);
      Vec got(T * d_c), row(d_c + d_r), pe_got(T * d_r), pe_want(T * d_r);
      for (int64_t t = 0; t < T; ++t) {
        kv_record_write(d_c, d_r, format, c.data() + t * d_c, pe.data() + t * d_r, record.data());
        kv_record_read(d_c, d_r, record.data(), row.data());
        std::copy_n(row.begin(), d_c, got.begin() + t * d_c);
        for (int64_t i = 0; i < d_r; ++i) {
          pe_got[t * d_r + i] = row[d_c + i];
          pe_want[t * d_r + i] = spec::to_float(spec::to_bf16(static_cast<float>(pe[t * d_r + i])));
        }
      }
      EXPECT_EQ(pe_got, pe_want);
      const double noise = rel(got, c);  // SPEC 0.6: 2.56e-2 free, 2.66e-2 power of two
      EXPECT_LE(noise, 2.9e-2);
      EXPECT_GE(noise, 2.3e-2);
    }
  }
  // 0.3 with a tile maximum of 448: scale 1, code 0x2A
  Vec c(128, 0.3), pe(2, 1.0);
  c[5] = 448;
  std::vector<uint8_t> record(128 + 4 + 4);
  kv_record_write(128, 2, spec::KvFormat::fp8_656_pow2, c.data(), pe.data(), record.data());
  EXPECT_EQ(record[0], 0x2A);
  EXPECT_EQ(record[5], 0x7E);
  float scale = 0;
  std::memcpy(&scale, record.data() + 128, 4);
  EXPECT_EQ(scale, 1.0f);
  EXPECT_EQ(record[132] | record[133] << 8, 0x3F80);
}

TEST(KvRecord, CacheWriteReadsBackAndSkipsNegativeSlots) {
  const int64_t d_c = 40, d_r = 8, page = 16, blocks = 3;
  const Vec c = normals(3 * d_c, 1), pe = normals(3 * d_r, 2);
  const std::vector<int32_t> slots = {2 * 16 + 5, -1, 3};
  for (const auto dtype : {spec::DType::f64, spec::DType::f32, spec::DType::bf16}) {
    const int64_t row = spec::mla_cache_row_bytes(spec::KvFormat::bf16, dtype, d_c, d_r);
    std::vector<uint8_t> cache(blocks * page * row, 0xFF);
    mla_cache_write(3, d_c, d_r, spec::KvFormat::bf16, dtype, c.data(), pe.data(), slots.data(),
                    cache.data());
    Vec got(d_c + d_r);
    for (const int64_t t : {0, 2}) {
      mla_cache_read(slots[t], d_c, d_r, spec::KvFormat::bf16, dtype, cache.data(), got.data());
      const double bound = dtype == spec::DType::f64   ? 0
                           : dtype == spec::DType::f32 ? 6e-8
                                                       : 0.0040;
      for (int64_t i = 0; i < d_c; ++i)
        EXPECT_LE(std::abs(got[i] - c[t * d_c + i]), bound * std::abs(c[t * d_c + i]));
      for (int64_t i = 0; i < d_r; ++i)
        EXPECT_LE(std::abs(got[d_c + i] - pe[t * d_r + i]), bound * std::abs(pe[t * d_r + i]));
    }
    const auto untouched = std::count(cache.begin(), cache.end(), 0xFF);
    EXPECT_GE(untouched, (blocks * page - 2) * row);
  }
}

}  // namespace
}  // namespace v3b::ref
