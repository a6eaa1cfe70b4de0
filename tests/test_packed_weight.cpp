// Packed weights (kernels/gemm/packed_weight.h) against sums in float64, at every level: types, odd sizes, gathered rows,
// scales, every FP8 code.
#include <gtest/gtest.h>

#include <cmath>
#include <random>
#include <string>
#include <vector>

#include "kernels/core/buffer.h"
#include "kernels/core/cpu.h"
#include "kernels/gemm/fp8.h"
#include "kernels/gemm/packed_linear.h"
#include "kernels/gemm/packed_weight.h"

namespace v3b {
namespace {

using kern::Isa;
using spec::DType;

double get(const void* p, DType t, int64_t i) {
  if (t == DType::bf16) return spec::to_float(static_cast<const spec::bf16*>(p)[i]);
  if (t == DType::f8e4m3) return spec::to_float(static_cast<const spec::f8e4m3*>(p)[i]);
  return static_cast<const float*>(p)[i];
}
void put(void* p, DType t, int64_t i, float v) {
  if (t == DType::bf16) {
    static_cast<spec::bf16*>(p)[i] = spec::to_bf16(v);
  } else if (t == DType::f8e4m3) {
    static_cast<spec::f8e4m3*>(p)[i] = spec::to_f8e4m3(v);
  } else {
    static_cast<float*>(p)[i] = v;
  }
}

struct Matrix {
  DType type;
  int64_t rows, cols, ld;
  std::vector<uint8_t> bytes;
  Matrix(DType t, int64_t r, int64_t c, int64_t pad, uint64_t seed, bool round_to_bf16 = false)
      : type(t), rows(r), cols(c), ld(c + pad), bytes(static_cast<size_t>(r * ld * 4) + 64) {
    std::mt19937_64 rng(seed);
    std::normal_distribution<float> normal(0.0F, t == DType::f8e4m3 ? 8.0F : 1.0F);
    for (int64_t i = 0; i < r * ld; ++i) {
      const float v = i % ld < c ? normal(rng) : NAN;  // pads must never enter a sum
      put(data(), t, i, round_to_bf16 ? spec::to_float(spec::to_bf16(v)) : v);
    }
  }
  void* data() { return bytes.data(); }
  const void* data() const { return bytes.data(); }
  double at(int64_t r, int64_t c) const { return get(data(), type, r * ld + c); }
};
std::vector<float> scales(int64_t n, uint64_t seed) {
  std::mt19937_64 rng(seed);
  std::vector<float> s(static_cast<size_t>(n));
  for (float& v : s) v = std::exp2(static_cast<float>(rng() % 7) - 3.0F) * 1.25F;
  return s;
}

enum class Path { best, amx_emulated };
struct Problem {
  DType x, w;
  int64_t m, n, k;
  bool add = false, gathered = false, k_major = false, scaled = false;
  Path path = Path::best;
};

void check(const Problem& p) {
  SCOPED_TRACE(std::string(kern::isa_name(kern::best_isa())) + " x " + spec::dtype_name(p.x) +
               " w " + spec::dtype_name(p.w) + " m" + std::to_string(p.m) + " n" +
               std::to_string(p.n) + " k" + std::to_string(p.k) + " add" + std::to_string(p.add) +
               " gathered" + std::to_string(p.gathered) + " k_major" + std::to_string(p.k_major) +
               " scaled" + std::to_string(p.scaled) + " path" +
               std::to_string(static_cast<int>(p.path)));
  // Floats against a weight whose product is in bf16 are rounded to it: here they are already.
  const bool round = p.x == DType::f32 && p.w != DType::f32;
  const Matrix w = p.k_major ? Matrix(p.w, p.k, p.n, 3, 1) : Matrix(p.w, p.n, p.k, 5, 1);
  const Matrix x(p.x, p.m + 2, p.k, 7, 2, round);
  std::vector<int32_t> index;
  for (int64_t i = 0; i < p.m; ++i) index.push_back(static_cast<int32_t>((i * 5 + 1) % (p.m + 2)));
  const int64_t blocks = (p.k + 127) / 128, groups = kern::packed_groups(p.n);
  const auto sw = scales((p.n + 127) / 128 * blocks, 3), sx = scales(p.m * (blocks + 1), 4);

  kern::Buffer<uint8_t> packed(kern::packed_weight_bytes(p.w, p.n, p.k));
  std::fill(packed.begin(), packed.end(), uint8_t{0xff});
  const kern::PackSource source{p.w, w.data(), w.ld, p.k_major, p.n, p.k};
  for (int64_t g = 0; g < groups; g += 2)
    kern::pack_weight(source, packed.data(), g, std::min(groups, g + 2));
  kern::PackedWeight pw{p.w, p.n, p.k, packed.data(), p.scaled ? sw.data() : nullptr};

  const kern::RowsSource rows{p.x, x.data(), x.ld, p.gathered ? index.data() : nullptr, p.m, p.k};
  kern::Buffer<uint32_t> q(kern::packed_rows_dwords(p.w, p.m, p.k) + 1);
  std::fill(q.begin(), q.end(), 0xffffffffu);
  if (p.path == Path::amx_emulated) {
    kern::packed_rows_cpu_avx512bf16(rows, true, q.data(), 0, p.m);
  } else {
    for (int64_t r = 0; r < p.m; r += kern::packed_rows_chunk())
      kern::pack_rows(p.w, rows, q.data(), r, std::min(p.m, r + kern::packed_rows_chunk()));
  }
  EXPECT_EQ(q[q.size() - 1], 0xffffffffu) << "packing wrote past its end";
  const kern::PackedRows px{p.m, p.k, q.data(), p.scaled ? sx.data() : nullptr, blocks + 1};

  const int64_t ld = groups * 16 + 3;
  std::vector<float> c(static_cast<size_t>(p.m * ld), p.add ? 0.5F : NAN);
  const int64_t cut = groups / 2;  // two ranges of groups
  const auto product =
      p.path == Path::amx_emulated ? kern::packed_product_cpu_amx_emulated : kern::packed_product;
  if (cut > 0) product(pw, px, 0, cut, c.data(), ld, p.add);
  product(pw, px, cut, groups, c.data() + 16 * cut, ld, p.add);
  for (int64_t i = 0; i < p.m; ++i) {
    const int64_t row = p.gathered ? index[static_cast<size_t>(i)] : i;
    for (int64_t n = 0; n < groups * 16; ++n) {
      double want = 0, size = 0;
      for (int64_t k = 0; k < p.k && n < p.n; ++k) {
        double v = x.at(row, k) * (p.k_major ? w.at(k, n) : w.at(n, k));
        if (p.scaled)
          v *= static_cast<double>(sx[static_cast<size_t>(i * (blocks + 1) + k / 128)]) *
               static_cast<double>(sw[static_cast<size_t>(n / 128 * blocks + k / 128)]);
        want += v, size += v * v;
      }
      if (p.add) want += 0.5;
      // product_tolerance of bench/ops/gemm_common.h, of this element's own size.
      const double bound =
          8 * 0x1p-24 * std::sqrt(size * static_cast<double>(p.k)) + 0x1p-22 * std::abs(want);
      const double got = c[static_cast<size_t>(i * ld + n)];
      ASSERT_TRUE(std::abs(got - want) <= bound)
          << "row " << i << " output " << n << ": " << got << " not " << want;
    }
    for (int64_t n = groups * 16; n < ld; ++n) {
      const float pad = c[static_cast<size_t>(i * ld + n)];
      ASSERT_TRUE(p.add ? pad == 0.5F : std::isnan(pad)) << "wrote past the groups";
    }
  }
}

template <class F>
void at_all_levels(F&& f) {
  for (const Isa level : {Isa::avx2, Isa::avx512, Isa::avx512_bf16, Isa::amx}) {
    if (level > kern::best_isa()) continue;
    const kern::IsaCap cap(level);
    f(Path::best);
  }
  if (kern::fp8_gemm_avx512bf16_supported()) f(Path::amx_emulated);
}

TEST(PackedWeight, EveryRowCountTypeAndLevel) {
  at_all_levels([](Path path) {
    for (const DType w : {DType::bf16, DType::f8e4m3, DType::f32}) {
      if (path == Path::amx_emulated && w == DType::f32) continue;
      for (const DType x : {DType::bf16, DType::f32, DType::f8e4m3})
        for (const int64_t m : {1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 31, 33})
          check({x, w, m, 71, 161, m % 2 == 0, m % 3 == 0, false, w == DType::f8e4m3 && m % 5 != 0,
                 path});
    }
  });
}
TEST(PackedWeight, OddShapes) {
  const int64_t shapes[][2] = {{1, 1},    {16, 32},   {17, 31},   {33, 2},     {48, 33},  {64, 128},
                               {15, 129}, {130, 257}, {96, 1025}, {250, 1100}, {40, 2100}};
  at_all_levels([&](Path path) {
    for (const DType w : {DType::bf16, DType::f8e4m3, DType::f32}) {
      if (path == Path::amx_emulated && w == DType::f32) continue;
      for (const auto& s : shapes)
        for (const int64_t m : {1, 3, 8, 11, 128}) {
          if (m == 128 && s[0] * s[1] > 40000) continue;
          check({w, w, m, s[0], s[1], false, false, false, w == DType::f8e4m3, path});
        }
    }
  });
}
// Plain decoding has one row where speculative decoding verifies two to four: the same logits, or "same tokens" is luck.
TEST(PackedWeight, RowsBitsDoNotDependOnUpToFourRowsCompany) {
  at_all_levels([](Path path) {
    if (path != Path::best) return;  // a tile of AMX adds each row alone
    for (const DType type : {DType::bf16, DType::f8e4m3, DType::f32}) {
      const int64_t n = 7 * 16, k = 1184, groups = kern::packed_groups(n);
      const Matrix w(type, n, k, 0, 1),
          x(type == DType::f32 ? DType::f32 : DType::bf16, 4, k, 0, 2);
      kern::Buffer<uint8_t> packed(kern::packed_weight_bytes(type, n, k));
      kern::pack_weight({type, w.data(), w.ld, false, n, k}, packed.data(), 0, groups);
      const kern::PackedWeight pw{type, n, k, packed.data(), nullptr};
      std::vector<float> alone;
      for (int64_t m = 1; m <= 4; ++m) {
        kern::Buffer<uint32_t> q(kern::packed_rows_dwords(type, m, k));
        kern::pack_rows(type, {x.type, x.data(), x.ld, nullptr, m, k}, q.data(), 0, m);
        std::vector<float> c(static_cast<size_t>(m * n));
        kern::packed_product(pw, {m, k, q.data(), nullptr, 0}, 0, groups, c.data(), n, false);
        if (m == 1) alone = c;
        ASSERT_TRUE(std::equal(alone.begin(), alone.end(), c.begin()))
            << kern::isa_name(kern::best_isa()) << " " << spec::dtype_name(type) << " m" << m;
      }
    }
  });
}

TEST(PackedWeight, FromKMajor) {
  at_all_levels([](Path path) {
    for (const DType w : {DType::bf16, DType::f32}) {
      if (path == Path::amx_emulated && w == DType::f32) continue;
      for (const int64_t k : {1, 40, 129}) check({w, w, 5, 50, k, false, true, true, false, path});
    }
  });
}
// The widening is exact for every code, subnormals and both NaN codes included.
TEST(PackedWeight, EveryCode) {
  at_all_levels([](Path path) {
    constexpr int64_t n = 256, k = 40;
    for (const int64_t m : {1, 2, 9}) {
      Matrix w(DType::f8e4m3, n, k, 0, 1);
      for (int64_t i = 0; i < n; ++i)
        for (int64_t j = 0; j < k; ++j)
          w.bytes[static_cast<size_t>(i * k + j)] =
              j == i % k ? static_cast<uint8_t>(i) : uint8_t{0};
      Matrix x(DType::bf16, m, k, 0, 2);
      for (int64_t i = 0; i < m * k; ++i) put(x.data(), DType::bf16, i, 1.0F);
      kern::Buffer<uint8_t> packed(kern::packed_weight_bytes(DType::f8e4m3, n, k));
      kern::pack_weight({DType::f8e4m3, w.data(), k, false, n, k}, packed.data(), 0, n / 16);
      kern::Buffer<uint32_t> q(kern::packed_rows_dwords(DType::f8e4m3, m, k));
      const kern::RowsSource rows{DType::bf16, x.data(), k, nullptr, m, k};
      std::vector<float> c(static_cast<size_t>(m * n));
      const kern::PackedWeight pw{DType::f8e4m3, n, k, packed.data(), nullptr};
      const kern::PackedRows px{m, k, q.data(), nullptr, 0};
      if (path == Path::amx_emulated) {
        kern::packed_rows_cpu_avx512bf16(rows, true, q.data(), 0, m);
        kern::packed_product_cpu_amx_emulated(pw, px, 0, n / 16, c.data(), n, false);
      } else {
        kern::pack_rows(DType::f8e4m3, rows, q.data(), 0, m);
        kern::packed_product(pw, px, 0, n / 16, c.data(), n, false);
      }
      for (int64_t i = 0; i < m * n; ++i) {
        const float want = spec::to_float(spec::f8e4m3{static_cast<uint8_t>(i % n)});
        const float got = c[static_cast<size_t>(i)];
        EXPECT_TRUE(std::isnan(want) ? std::isnan(got) : got == want)
            << kern::packed_isa(DType::bf16, DType::f8e4m3) << " code " << i % n << ": " << got
            << " not " << want;
      }
    }
  });
}

// The whole product with the team: output types, adding, tails, rows beyond a block, one and several threads.
TEST(PackedWeight, Linear) {
  struct Case {
    DType w, x, c;
    int64_t m, n, k;
    bool add;
  };
  const Case cases[] = {
      {DType::bf16, DType::bf16, DType::f32, 1, 256, 96, false},
      {DType::bf16, DType::f32, DType::f32, 1, 256, 96, true},
      {DType::bf16, DType::bf16, DType::bf16, 3, 1003, 516, false},
      {DType::bf16, DType::bf16, DType::f32, 70, 403, 316, true},
      {DType::bf16, DType::bf16, DType::bf16, 530, 83, 140, false},
      {DType::bf16, DType::f32, DType::f32, 530, 83, 140, true},
      {DType::f32, DType::f32, DType::f32, 17, 600, 700, true},
      {DType::f8e4m3, DType::f8e4m3, DType::bf16, 5, 1003, 516, false},
      {DType::f8e4m3, DType::f8e4m3, DType::f32, 530, 83, 140, true},
      {DType::bf16, DType::bf16, DType::f32, 4, 20, 0, false},
      {DType::bf16, DType::bf16, DType::f32, 0, 20, 30, false},
  };
  const int before = kern::num_threads();
  for (const int threads : {1, 2, 3}) {
    kern::set_num_threads(threads);
    at_all_levels([&](Path path) {
      if (path == Path::amx_emulated) return;
      for (const Case& t : cases) {
        SCOPED_TRACE(std::string(kern::isa_name(kern::best_isa())) + " w " + spec::dtype_name(t.w) +
                     " c " + spec::dtype_name(t.c) + " m" + std::to_string(t.m) + " n" +
                     std::to_string(t.n) + " k" + std::to_string(t.k));
        const bool codes = t.x == DType::f8e4m3;
        const Matrix w(t.w, t.n, t.k, 0, 1), x(t.x, t.m, t.k, 2, 2, t.x == DType::f32);
        const int64_t blocks = (t.k + 127) / 128;
        const auto sw = scales((t.n + 127) / 128 * blocks + 1, 3), sx = scales(t.m * blocks + 1, 4);
        const kern::PackedMatrix packed({t.w, w.data(), w.ld, false, t.n, t.k},
                                        codes ? sw.data() : nullptr);
        Matrix c(t.c, t.m, t.n, 6, 5);
        const Matrix was = c;
        kern::packed_linear(packed.view(), {t.x, x.data(), x.ld, nullptr, t.m, t.k},
                            {c.data(), c.ld, t.c, t.add}, codes ? sx.data() : nullptr);
        for (int64_t i = 0; i < t.m; ++i) {
          for (int64_t n = 0; n < t.n; ++n) {
            double want = 0, size = 0;
            for (int64_t k = 0; k < t.k; ++k) {
              double v = x.at(i, k) * w.at(n, k);
              if (codes)
                v *= static_cast<double>(sx[static_cast<size_t>(i * blocks + k / 128)]) *
                     static_cast<double>(sw[static_cast<size_t>(n / 128 * blocks + k / 128)]);
              want += v, size += v * v;
            }
            if (t.add) want += was.at(i, n);
            const double bound = 8 * 0x1p-24 * std::sqrt(size * static_cast<double>(t.k)) +
                                 (t.c == DType::bf16 ? 0x1p-8 * 1.01 : 0x1p-22) * std::abs(want);
            ASSERT_TRUE(std::abs(c.at(i, n) - want) <= bound)
                << "row " << i << " output " << n << ": " << c.at(i, n) << " not " << want;
          }
          for (int64_t n = t.n; n < c.ld; ++n)
            ASSERT_TRUE(std::isnan(c.at(i, n))) << "wrote beyond the outputs";
        }
      }
    });
  }
  kern::set_num_threads(before);
}

}  // namespace
}  // namespace v3b
