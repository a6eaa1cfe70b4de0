// moe_accum (SPEC 1.14, Appendix B): the sum of experts in bf16 against transformers' own, bit by
// bit; and capacity with dropping (SPEC 1.15): the kernel against the reference.
#include <gtest/gtest.h>

#include <bit>
#include <cmath>
#include <limits>
#include <numeric>

#include "bench/harness/flags_text.h"
#include "kernels/moe/moe.h"
#include "model/rng.h"
#include "model/weights.h"
#include "reference/moe.h"

namespace v3b {
namespace {

using spec::DropPolicy;
using spec::MoeAccum;

// tests/goldens/tiny_v3/moe_accum.safetensors: one expert layer of the shipped model in bf16, as
// transformers 5 computes it (scripts/make_goldens.py --only moe_accum).
struct Golden {
  model::SafetensorsFile file = model::open_safetensors(
      std::string(V3B_SOURCE_DIR) + "/tests/goldens/tiny_v3/moe_accum.safetensors");
  int64_t T = file.tensors.at("out").shape[0], K = file.tensors.at("out").shape[1],
          d = file.tensors.at("out").shape[2], E = 16;
  std::vector<int32_t> idx;
  std::vector<float> weight = floats("weight"), out = floats("out"), routed = floats("routed"),
                     shared = floats("shared"), y = floats("y");
  ref::Dispatch plan;
  std::vector<float> rows;  // of `out`, in expert order
  Golden() {
    const auto& t = file.tensors.at("idx");
    const auto* p = static_cast<const int32_t*>(t.data);
    idx.assign(p, p + t.numel());
    plan = ref::dispatch(T, K, E, idx.data());
    rows.resize(out.size());
    for (int64_t i = 0; i < T * K; ++i)
      std::copy_n(out.data() + i * d, d, rows.data() + plan.row[size_t(i)] * d);
  }
  std::vector<float> floats(const std::string& k) const {
    return model::to_float_vector(file.tensors.at(k));
  }
};

int64_t different(const std::vector<float>& a, const std::vector<float>& b) {
  int64_t n = 0;
  for (size_t i = 0; i < a.size(); ++i) n += !(a[i] == b[i]);
  return a.size() == b.size() ? n : int64_t(a.size());
}

TEST(MoeAccum, ReferenceSumsAsTransformers) {
  const Golden g;
  ASSERT_GT(g.routed.size(), 500u);
  std::vector<float> y(g.routed.size());
  ref::combine_rows<float>(g.plan, g.T, g.K, g.d, g.rows.data(), g.weight.data(), y.data(),
                           MoeAccum::bf16);
  EXPECT_EQ(different(y, g.routed), 0);
  for (size_t i = 0; i < y.size(); ++i) y[i] = ref::add_bf16(y[i], g.shared[i]);
  EXPECT_EQ(different(y, g.y), 0);
  // Doubles hold the same floats.
  const std::vector<double> rows(g.rows.begin(), g.rows.end()), w(g.weight.begin(), g.weight.end());
  std::vector<double> yd(y.size());
  ref::combine_rows<double>(g.plan, g.T, g.K, g.d, rows.data(), w.data(), yd.data(),
                            MoeAccum::bf16);
  EXPECT_EQ(different(std::vector<float>(yd.begin(), yd.end()), g.routed), 0);
  // The golden can tell: one rounding at the end is something else.
  ref::combine_rows<float>(g.plan, g.T, g.K, g.d, g.rows.data(), g.weight.data(), y.data());
  for (float& v : y) v = spec::to_float(spec::to_bf16(v));
  EXPECT_GT(different(y, g.routed), int64_t(y.size()) / 10);
}

TEST(MoeAccum, CombineKernelSumsAsTransformers) {
  const Golden g;
  std::vector<spec::bf16> rows, y(g.routed.size());
  for (const float v : g.rows) rows.push_back(spec::to_bf16(v));
  spec::MoeCombineArgs a{g.T,
                         g.d,
                         g.K,
                         spec::DType::bf16,
                         rows.data(),
                         g.plan.row.data(),
                         g.weight.data(),
                         y.data(),
                         MoeAccum::bf16};
  const auto result = [&] {
    kern::moe_combine_cpu_simd(a);
    std::vector<float> f;
    for (const auto v : y) f.push_back(spec::to_float(v));
    return f;
  };
  EXPECT_EQ(different(result(), g.routed), 0);
  a.moe_accum = MoeAccum::fp32;
  EXPECT_GT(different(result(), g.routed), int64_t(y.size()) / 10);
}

TEST(MoeAccum, IsAFlagOfTheForwardPass) {
  EXPECT_EQ(bench::parse_forward_flags("moe_accum=bf16").moe_accum, MoeAccum::bf16);
  EXPECT_EQ(bench::changed_flags_text(bench::parse_forward_flags("moe_accum=bf16")),
            "moe_accum=bf16");
}

// Routes with unused slots and popular experts, gates with ties.
TEST(Capacity, KernelKeepsWhatTheReferenceKeeps) {
  for (const auto& [T, K, E] : {std::tuple{1, 1, 1}, {7, 3, 5}, {64, 2, 4}, {200, 8, 32}}) {
    std::vector<int32_t> idx;
    std::vector<float> gate;
    for (int64_t i = 0; i < T * K; ++i) {
      const auto draw = [&](uint64_t stream, int64_t n) {
        return int32_t(model::rng_below({uint64_t(T), stream}, uint64_t(i), n));
      };
      const int32_t e = std::min(draw(1, E), draw(2, E));
      idx.push_back(draw(3, 11) == 0 ? -1 : e);
      gate.push_back(float(draw(4, 16)) / 16.0F);
    }
    const std::vector<double> wide(gate.begin(), gate.end());
    for (const auto policy : {DropPolicy::slot, DropPolicy::token, DropPolicy::prob})
      for (const double cf : {0.3, 1.0, 1.25, 100.0}) {
        const int64_t C = ref::expert_capacity(cf, K, T, E);
        EXPECT_EQ(kern::moe_expert_capacity(cf, K, T, E), C);
        std::vector<uint8_t> keep(idx.size(), 7);
        kern::moe_capacity_cpu({T, E, K, idx.data(), gate.data(), C, policy, keep.data()});
        const auto want = ref::apply_capacity(T, K, E, idx.data(), wide.data(), C, policy);
        EXPECT_TRUE(std::equal(keep.begin(), keep.end(), want.begin(), want.end()))
            << T << " " << cf << " policy " << int(policy);
        if (cf == 100.0) {
          EXPECT_EQ(
              std::accumulate(keep.begin(), keep.end(), int64_t{0}),
              int64_t(std::count_if(idx.begin(), idx.end(), [](int32_t e) { return e >= 0; })));
        }
      }
  }
}

TEST(Capacity, FactorsOutOfRange) {
  EXPECT_EQ(kern::moe_expert_capacity(std::numeric_limits<double>::infinity(), 2, 8, 4), 16);
  EXPECT_EQ(kern::moe_expert_capacity(1e-9, 2, 8, 4), 1);
}

}  // namespace
}  // namespace v3b
