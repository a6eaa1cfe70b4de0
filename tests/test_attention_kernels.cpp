// The attention kernels against the reference at the small odd shapes of their ops, and what no op
// covers.
#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <limits>
#include <memory>
#include <vector>

#include "bench/harness/check.h"
#include "bench/ops/registry.h"
#include "kernels/attention/attention.h"
#include "kernels/core/cpu.h"
#include "reference/attention.h"
#include "reference/kv_cache.h"

namespace v3b {
namespace {

bool is_attention(const std::string& op) {
  return op.find("attention_") == 0 || op.find("mla_") == 0;
}

TEST(AttentionKernels, OddShapesOfEveryOpAndImplementation) {
  int checked = 0;
  for (const int threads : {1, 2, 3}) {
    kern::set_num_threads(threads);
    for (const auto& op : bench::all_ops()) {
      if (!is_attention(op->name())) continue;
      for (const auto& c : op->cases()) {
        if (!c.check_only) continue;
        bench::CaseChecker checker(*op, c, 7);
        for (const auto& how : op->impls()) {
          if (how.starts_with("cuda")) continue;  // tests/test_cuda_emulated_attention.cpp
          const auto r = checker.check(how);
          if (how.ends_with("@amx") && kern::best_isa() < kern::Isa::amx) {
            EXPECT_EQ(r.status, "unsupported") << op->name() << "." << how;
            continue;  // tests/test_attention_emulated_tiles.cpp
          }
          EXPECT_EQ(r.status, "passed")
              << op->name() << "." << how << " " << c.text << ": " << r.reason;
          ++checked;
        }
      }
    }
  }
  EXPECT_GE(checked, 300);
  kern::set_num_threads(0);
}

TEST(AttentionKernels, GatheredRowsAreWhatTheReferenceReads) {
  const int64_t page = 16, blocks = 9, s = 77, d_c = 160, d_r = 10;
  const std::vector<int32_t> table = {4, 0, 7, 2, 8};
  for (const auto dtype : {spec::DType::f32, spec::DType::bf16})
    for (const auto format :
         {spec::KvFormat::bf16, spec::KvFormat::fp8_656_pow2, spec::KvFormat::fp8_656_free}) {
      std::vector<float> c(blocks * page * d_c), pe(blocks * page * d_r);
      for (size_t i = 0; i < c.size(); ++i) c[i] = std::sin(0.1f * float(i)) * 3;
      for (size_t i = 0; i < pe.size(); ++i) pe[i] = std::cos(0.1f * float(i));
      std::vector<int32_t> slots(blocks * page);
      for (size_t i = 0; i < slots.size(); ++i) slots[i] = int32_t(i);
      std::vector<uint8_t> cache(blocks * page *
                                 spec::mla_cache_row_bytes(format, dtype, d_c, d_r));
      ref::mla_cache_write(blocks * page, d_c, d_r, format, dtype, c.data(), pe.data(),
                           slots.data(), cache.data());
      const int64_t e = spec::dtype_bytes(dtype), d = d_c + d_r;
      std::vector<uint8_t> out(s * d * e, 0xCC);
      kern::mla_cache_gather_cpu_simd(
          {s, d_c, d_r, page, dtype, format, table.data(), cache.data(), out.data()});
      std::vector<float> row(d);
      for (int64_t j = 0; j < s; ++j) {
        ref::mla_cache_read(table[j / page] * page + j % page, d_c, d_r, format, dtype,
                            cache.data(), row.data());
        for (int64_t i = 0; i < d; ++i) {
          float got = 0;
          if (dtype == spec::DType::f32) {
            std::memcpy(&got, out.data() + (j * d + i) * 4, 4);
          } else {
            uint16_t u = 0;
            std::memcpy(&u, out.data() + (j * d + i) * 2, 2);
            got = spec::to_float(spec::bf16{u});
          }
          ASSERT_EQ(got, row[i]) << "row " << j << " element " << i;
        }
      }
    }
}

// Every level that this machine has.
std::vector<kern::Isa> levels() {
  std::vector<kern::Isa> r;
  for (const auto level :
       {kern::Isa::avx2, kern::Isa::avx512, kern::Isa::avx512_bf16, kern::Isa::amx})
    if (level <= kern::best_isa()) r.push_back(level);
  return r;
}

// One step of decode with n_h heads over one shared key/value head, bf16: o [n_h, d].
std::vector<float> decode_bf16(int64_t n_h, int64_t s, int64_t d, const std::vector<float>& q,
                               const std::vector<float>& k, const std::vector<float>& v) {
  const auto bf16 = [](const std::vector<float>& x) {
    std::vector<spec::bf16> r;
    for (const float f : x) r.push_back(spec::to_bf16(f));
    return r;
  };
  const auto q16 = bf16(q), k16 = bf16(k), v16 = bf16(v);
  std::vector<spec::bf16> o(size_t(n_h * d));
  std::vector<float> lse(static_cast<size_t>(n_h));
  spec::AttentionDecodeArgs a{};
  const int32_t len = int32_t(s);
  a.B = 1, a.n_h = n_h, a.n_kv = 1, a.d_qk = a.d_v = d, a.scale = 1, a.dtype = spec::DType::bf16;
  a.q = q16.data(), a.k = k16.data(), a.v = v16.data(), a.k_row = a.v_row = d;
  a.cache_seqlens = &len, a.o = o.data(), a.lse = lse.data();
  kern::attention_decode_cpu_simd(a);
  std::vector<float> r;
  for (const auto x : o) r.push_back(spec::to_float(x));
  return r;
}

TEST(AttentionKernels, NanReachesTheOutputAtEveryLevelInBf16) {
  const float nan = std::numeric_limits<float>::quiet_NaN();
  const int64_t s = 150, d = 40;
  for (const auto level : levels()) {
    const kern::IsaCap cap(level);
    for (const int64_t n_h : {1, 2, 3, 4, 7, 16, 70}) {  // few rows, a panel, more
      std::vector<float> q(size_t(n_h * d), 0.5f), k(size_t(s * d), 0.25f), v(size_t(s * d), 1.0f);
      k[141 * d + 39] = nan;
      for (const float x : decode_bf16(n_h, s, d, q, k, v))
        EXPECT_TRUE(std::isnan(x)) << kern::isa_name(level) << " heads " << n_h;
      k[141 * d + 39] = 0.25f;
      v[5 * d + 33] = nan;
      const auto o = decode_bf16(n_h, s, d, q, k, v);
      for (int64_t h = 0; h < n_h; ++h) {
        EXPECT_TRUE(std::isnan(o[size_t(h * d + 33)])) << kern::isa_name(level) << " heads " << n_h;
        EXPECT_EQ(o[size_t(h * d + 32)], 1.0f) << kern::isa_name(level) << " heads " << n_h;
      }
    }
  }
}

// Scores that grow with every key move the maximum in every block; those that shrink leave only the first key.
TEST(AttentionKernels, GrowingAndShrinkingScoresAtEveryLevelInBf16) {
  const int64_t s = 600, d = 32;
  for (const auto level : levels()) {
    const kern::IsaCap cap(level);
    for (const int64_t n_h : {1, 4, 20, 80})
      for (const float slope : {1.0f, -1.0f}) {
        std::vector<float> q(size_t(n_h * d), 1.0f), k(size_t(s * d)), v(size_t(s * d));
        for (int64_t j = 0; j < s; ++j)
          for (int64_t c = 0; c < d; ++c)
            k[size_t(j * d + c)] = slope * float(j / 4 * 4) / 8,
                             v[size_t(j * d + c)] = float(j / 4);
        const float expected = slope > 0 ? 149 : 0;  // four keys a step of 16 between scores
        for (const float x : decode_bf16(n_h, s, d, q, k, v))
          ASSERT_NEAR(x, expected, 1e-4) << kern::isa_name(level) << " heads " << n_h;
      }
  }
}

TEST(AttentionKernels, NanInKeysOrQueriesReachesTheOutput) {
  const float nan = std::numeric_limits<float>::quiet_NaN();
  for (const int64_t n_h : {1, 16}) {  // few rows, many rows
    const int64_t s = 40, d = 8;
    std::vector<float> q(n_h * d, 0.5f), k(s * d, 0.25f), v(s * d, 1.0f), o(n_h * d), lse(n_h);
    k[17 * d + 3] = nan;
    spec::AttentionDecodeArgs a{};
    const int32_t len = s;
    a.B = 1, a.n_h = n_h, a.n_kv = 1, a.d_qk = a.d_v = d, a.scale = 1, a.dtype = spec::DType::f32;
    a.q = q.data(), a.k = k.data(), a.v = v.data(), a.k_row = a.v_row = d, a.cache_seqlens = &len;
    a.o = o.data(), a.lse = lse.data();
    kern::attention_decode_cpu_simd(a);
    for (float x : o) EXPECT_TRUE(std::isnan(x));
    k[17 * d + 3] = 0.25f;
    v[5 * d + 1] = nan;
    kern::attention_decode_cpu_simd(a);
    for (int64_t h = 0; h < n_h; ++h) {
      EXPECT_TRUE(std::isnan(o[h * d + 1]));
      EXPECT_FLOAT_EQ(o[h * d], 1.0f);
    }
  }
}

TEST(AttentionKernels, LargeScoresDoNotOverflow) {
  const int64_t s = 300, d = 16, n_h = 20;
  std::vector<float> q(n_h * d, 30.0f), k(s * d), v(s * d), o(n_h * d), lse(n_h);
  for (int64_t j = 0; j < s; ++j)
    for (int64_t c = 0; c < d; ++c)
      k[j * d + c] = float(j) * (c % 2 ? 1.0f : 0.5f), v[j * d + c] = float(j);
  spec::AttentionDecodeArgs a{};
  const int32_t len = s;
  a.B = 1, a.n_h = n_h, a.n_kv = 1, a.d_qk = a.d_v = d, a.scale = 1, a.dtype = spec::DType::f32;
  a.q = q.data(), a.k = k.data(), a.v = v.data(), a.k_row = a.v_row = d, a.cache_seqlens = &len;
  a.o = o.data(), a.lse = lse.data();
  kern::attention_decode_cpu_simd(a);
  for (float x : o) EXPECT_FLOAT_EQ(x, 299.0f);
  for (float x : lse) EXPECT_FLOAT_EQ(x, 30.0f * 16 * 0.75f * 299);
}

}  // namespace
}  // namespace v3b
