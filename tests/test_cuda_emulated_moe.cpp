// Router, dispatch, combine, acceptance and sampling kernels in the emulation: the ops' own cases, then ties, NaN,
// many tiles, unused slots, many vocabularies and uniforms.
#include <cmath>
#include <set>

#include "kernels/moe/moe_cuda.h"
#include "kernels/mtp/mtp_cuda.h"
#include "model/error.h"
#include "model/rng.h"
#include "reference/moe.h"
#include "reference/router.h"
#include "reference/speculative.h"
#include "tests/cuda_emulated.h"

namespace v3b::kern {
namespace {

using testing::check_op;
using testing::device;
using testing::host;

const float kNan = std::numeric_limits<float>::quiet_NaN();

TEST(CudaMoe, OpCases) {
  check_op("router", "cuda_simt",
           {"T=70", "T=9,E=16,K=4,G=4,M=2", "T=9,E=384,G=1,M=1,group_rule=none,c_r=2.827",
            "T=9,E=160,K=6,G=8,M=3,scoring=softmax,group_rule=max,norm_topk_prob=false,bias=false",
            "T=5,E=512,K=16,G=8,M=4", "T=5,E=1024,K=32,G=64,M=32", "T=5,E=128,K=8,G=64,M=8"});
  check_op("moe_dispatch", "cuda_simt",
           {"T=8", "T=300,d=64,E=16,K=4", "T=200,d=24,E=300,K=8", "T=9,d=16,E=1100,K=8,dtype=f32"});
  check_op("moe_combine", "cuda_simt", {"T=8", "T=5,d=2064,E=16,K=4,dtype=f32"});
}
TEST(CudaMtp, OpCases) {
  check_op("mtp_accept", "cuda_simt", {"B=3,gamma=1,V=16384", "B=3,gamma=2,V=9001,greedy=true"});
}

// Few distinct logits: the order of equal scores decides nearly everything.
TEST(CudaMoe, RouterTies) {
  using spec::GroupRule;
  for (const auto mask : {spec::RouterMask::neg_inf, spec::RouterMask::zero})
    for (const GroupRule rule : {GroupRule::none, GroupRule::top2_sum, GroupRule::max})
      for (const auto scoring : {spec::Scoring::sigmoid, spec::Scoring::softmax})
        for (const int64_t E : {8, 48, 256, 320}) {
          const int64_t T = 20, K = 3;
          spec::RouterConfig c = {.E = E,
                                  .K = K,
                                  .G = 4,
                                  .M = 2,
                                  .scoring = scoring,
                                  .group_rule = rule,
                                  .router_mask = mask};
          c.scale_only_if_unnormalised = E == 48;
          std::vector<float> z(static_cast<size_t>(T * E));
          for (size_t i = 0; i < z.size(); ++i)
            z[i] = static_cast<float>(model::rng_below({uint64_t(E), 5}, i, 3));
          for (int64_t e = 0; e < E; ++e) z[size_t(E + e)] = 1;  // a row of equals
          const DeviceBuffer dz = device(z), idx(T * K * 4), weight(T * K * 4);
          router_cuda_simt(
              {c, T, dz.as<float>(), nullptr, idx.as<int32_t>(), weight.as<float>(), nullptr},
              cuda_stream());
          // Softmax: two sums of other orders differ in the last bits, equal logits do not.
          const std::vector<double> wide(z.begin(), z.end());
          const auto want = ref::route<double>(c, T, wide.data(), nullptr);
          EXPECT_EQ(host<int32_t>(idx), want.idx) << E << " rule " << int(rule);
          const auto w = host<float>(weight);
          for (size_t i = 0; i < w.size(); ++i)
            ASSERT_NEAR(w[i], want.weight[i], 4e-6 * want.weight[i]);
        }
}
TEST(CudaMoe, RouterNanComesLast) {
  const int64_t E = 40, K = 6;
  spec::RouterConfig c = {.E = E, .K = K, .G = 1, .M = 1, .group_rule = spec::GroupRule::none};
  std::vector<float> z(static_cast<size_t>(E), kNan);
  z[7] = -90, z[33] = 2, z[35] = -std::numeric_limits<float>::infinity();
  const DeviceBuffer dz = device(z), idx(K * 4), weight(K * 4);
  router_cuda_simt({c, 1, dz.as<float>(), nullptr, idx.as<int32_t>(), weight.as<float>(), nullptr},
                   cuda_stream());
  EXPECT_EQ(host<int32_t>(idx), (std::vector<int32_t>{33, 7, 35, 0, 1, 2}));
  // NaN in a group: that group comes last, no index appears twice.
  c = {.E = E, .K = K, .G = 4, .M = 2};
  for (int64_t e = 0; e < E; ++e) z[size_t(e)] = static_cast<float>(e % 7);
  z[3] = kNan;
  const DeviceBuffer dz2 = device(z);
  router_cuda_simt({c, 1, dz2.as<float>(), nullptr, idx.as<int32_t>(), weight.as<float>(), nullptr},
                   cuda_stream());
  const auto got = host<int32_t>(idx);
  EXPECT_EQ(std::set<int32_t>(got.begin(), got.end()).size(), size_t(K));
  for (const int32_t e : got) EXPECT_GE(e, 10);
  c.E = 2000;
  EXPECT_THROW(router_cuda_simt({c, 1, nullptr, nullptr, nullptr, nullptr, nullptr}, cuda_stream()),
               Error);
}

TEST(CudaMoe, DispatchUnusedSlotsAndManyTiles) {
  for (const int64_t T : {0, 1, 100, 128, 129, 700})
    for (const int64_t E : {3, 256, 1500}) {
      const int64_t K = 8, d = 8;
      std::vector<int32_t> idx(static_cast<size_t>(T * K));
      for (size_t i = 0; i < idx.size(); ++i)
        idx[i] = static_cast<int32_t>(model::rng_below({uint64_t(T), 3}, i, E + 1)) - 1;
      const auto want = ref::dispatch(T, K, E, idx.data());
      const DeviceBuffer di = device(idx), offsets((E + 1) * 8),
                         row(std::max<int64_t>(T * K, 1) * 8);
      const spec::MoeDispatchArgs a = {T,
                                       d,
                                       E,
                                       K,
                                       spec::DType::bf16,
                                       nullptr,
                                       di.as<int32_t>(),
                                       offsets.as<int64_t>(),
                                       row.as<int64_t>(),
                                       nullptr};
      const DeviceBuffer scratch(moe_dispatch_cuda_scratch_bytes(a));
      moe_dispatch_cuda_simt(a, scratch.data(), cuda_stream());
      EXPECT_EQ(host<int64_t>(offsets), want.offsets) << T << " " << E;
      auto got = host<int64_t>(row);
      got.resize(static_cast<size_t>(T * K));
      EXPECT_EQ(got, want.row) << T << " " << E;
    }
}

// Dropping by capacity and bf16 accumulation, small and of many tiles.
TEST(CudaMoe, CapacityAndBf16Accumulation) {
  for (const auto policy :
       {spec::DropPolicy::slot, spec::DropPolicy::token, spec::DropPolicy::prob})
    for (const int64_t T : {40, 400}) {
      const int64_t K = 4, E = 9, d = 24, capacity = T * K / E / 2;
      std::vector<int32_t> idx(static_cast<size_t>(T * K));
      std::vector<float> gate(idx.size());
      for (size_t i = 0; i < idx.size(); ++i) {
        idx[i] = static_cast<int32_t>(model::rng_below({uint64_t(T), 3}, i, E + 1)) - 1;
        gate[i] = static_cast<float>(1 + model::rng_below({uint64_t(T), 4}, i, 16)) / 16;
      }
      const std::vector<double> wide_gate(gate.begin(), gate.end());
      const auto keep =
          ref::apply_capacity(T, K, E, idx.data(), wide_gate.data(), capacity, policy);
      std::vector<int32_t> served = idx;
      int dropped = 0;
      for (size_t i = 0; i < served.size(); ++i)
        if (!keep[i]) dropped += served[i] >= 0, served[i] = -1;
      EXPECT_GT(dropped, T / 2);
      const auto want = ref::dispatch(T, K, E, served.data());
      const DeviceBuffer di = device(idx), dg = device(gate), offsets((E + 1) * 8), row(T * K * 8);
      spec::MoeDispatchArgs a = {T,
                                 d,
                                 E,
                                 K,
                                 spec::DType::bf16,
                                 nullptr,
                                 di.as<int32_t>(),
                                 offsets.as<int64_t>(),
                                 row.as<int64_t>(),
                                 nullptr};
      a.capacity = capacity, a.weight = dg.as<float>(), a.drop_policy = policy;
      const DeviceBuffer scratch(moe_dispatch_cuda_scratch_bytes(a));
      moe_dispatch_cuda_simt(a, scratch.data(), cuda_stream());
      EXPECT_EQ(host<int64_t>(offsets), want.offsets) << T << " " << int(policy);
      EXPECT_EQ(host<int64_t>(row), want.row) << T << " " << int(policy);

      std::vector<float> rows(static_cast<size_t>(want.slot.size()) * size_t(d));
      for (size_t i = 0; i < rows.size(); ++i)
        rows[i] = static_cast<float>(model::rng_normal({uint64_t(T), 6}, i));
      const DeviceBuffer dr = device(rows), y(T * d * 4);
      spec::MoeCombineArgs c = {
          T, d, K, spec::DType::f32, dr.data(), row.as<int64_t>(), dg.as<float>(), y.data()};
      c.moe_accum = spec::MoeAccum::bf16;
      moe_combine_cuda_simt(c, cuda_stream());
      std::vector<float> want_y(static_cast<size_t>(T * d));
      ref::combine_rows<float>(want, T, K, d, rows.data(), gate.data(), want_y.data(), c.moe_accum);
      EXPECT_EQ(host<float>(y), want_y);
    }
}

std::vector<float> distribution(uint64_t seed, int64_t V, double spread, double zeros) {
  std::vector<double> p(static_cast<size_t>(V));
  double total = 0;
  for (size_t i = 0; i < p.size(); ++i) {
    const bool zero = i + 1 < p.size() && model::rng_uniform({seed, 1}, i) < zeros;
    total += p[i] = zero ? 0 : std::exp(spread * model::rng_normal({seed, 2}, i));
  }
  std::vector<float> f;
  for (const double v : p) f.push_back(static_cast<float>(v / total));
  return f;
}

// Many sequences against the reference: sparse rows, q of other support, one-hot drafts, uniforms at both ends.
TEST(CudaMtp, SampledAcceptance) {
  for (const int64_t V : {2, 13, 5000, 12289})
    for (const int64_t gamma : {1, 3})
      for (const bool one_hot : {false, true}) {
        const int64_t B = V > 1000 ? 12 : 60, rows = gamma + 1;
        std::vector<float> p, q;
        std::vector<int32_t> draft;
        std::vector<double> u;
        for (int64_t b = 0; b < B; ++b)
          for (int64_t k = 0; k < rows; ++k) {
            const uint64_t seed = uint64_t(1000 * b + k);
            const auto pr = distribution(seed, V, 2, 0.3), qr = distribution(seed + 500, V, 2, 0.3);
            const bool same = (b + k) % 4 == 0;  // nothing left over: p <= q everywhere
            p.insert(p.end(), pr.begin(), pr.end());
            u.push_back(b % 5 == 0   ? 0.0
                        : b % 5 == 1 ? 1 - 0x1p-53
                                     : model::rng_uniform({seed, 7}, 0));
            if (k == gamma) continue;
            q.insert(q.end(), same ? pr.begin() : qr.begin(), same ? pr.end() : qr.end());
            draft.push_back(int32_t(model::rng_below({seed, 8}, 0, V)));
          }
        const DeviceBuffer dp = device(p), dq = device(q), dd = device(draft), du = device(u);
        const DeviceBuffer count(B * 4), tokens(B * rows * 4);
        spec::MtpAcceptArgs a = {B,
                                 gamma,
                                 V,
                                 false,
                                 dp.as<float>(),
                                 one_hot ? nullptr : dq.as<float>(),
                                 dd.as<int32_t>(),
                                 du.as<double>(),
                                 count.as<int32_t>(),
                                 tokens.as<int32_t>()};
        const DeviceBuffer scratch(mtp_accept_cuda_scratch_bytes(a));
        mtp_accept_cuda_simt(a, scratch.data(), cuda_stream());
        std::vector<int32_t> want_count(static_cast<size_t>(B)),
            want(static_cast<size_t>(B * rows));
        ref::mtp_accept({B, gamma, V, false, p.data(), one_hot ? nullptr : q.data(), draft.data(),
                         u.data(), want_count.data(), want.data()});
        EXPECT_EQ(host<int32_t>(count), want_count);
        EXPECT_EQ(host<int32_t>(tokens), want) << "V " << V << " gamma " << gamma;
      }
}
// gamma = 0: plain sampling and argmax.
TEST(CudaMtp, PlainSampling) {
  const int64_t B = 9, V = 6001;
  std::vector<float> p;
  std::vector<double> u;
  for (int64_t b = 0; b < B; ++b) {
    const auto row = distribution(uint64_t(b), V, 3, 0.5);
    p.insert(p.end(), row.begin(), row.end());
    u.push_back(model::rng_uniform({77, 1}, uint64_t(b)));
  }
  p[5] = p[4] = 2;  // equal largest
  p[size_t(V) + 9] = kNan;
  for (const bool greedy : {false, true}) {
    const DeviceBuffer dp = device(p), du = device(u), count(B * 4), tokens(B * 4);
    spec::MtpAcceptArgs a = {B,
                             0,
                             V,
                             greedy,
                             dp.as<float>(),
                             nullptr,
                             nullptr,
                             du.as<double>(),
                             count.as<int32_t>(),
                             tokens.as<int32_t>()};
    const DeviceBuffer scratch(mtp_accept_cuda_scratch_bytes(a));
    mtp_accept_cuda_simt(a, scratch.data(), cuda_stream());
    const auto got = host<int32_t>(tokens);
    EXPECT_EQ(host<int32_t>(count), std::vector<int32_t>(size_t(B), 0));
    for (int64_t b = 0; b < B; ++b) {
      std::vector<double> row(p.begin() + b * V, p.begin() + (b + 1) * V);
      if (b == 1) {  // NaN: never the argmax; sampling only has to stay in range
        row[9] = 0;
        EXPECT_GE(got[1], 0);
        EXPECT_LT(got[1], V);
        if (!greedy) continue;
      }
      EXPECT_EQ(got[size_t(b)], greedy ? ref::argmax(row) : ref::sample(row, u[size_t(b)])) << b;
    }
  }
}

TEST(CudaMtp, SamplingDistribution) {
  for (const int64_t V : {3, 1000, 5003})
    for (const double top_p : {1.0, 0.95, 0.3, 1e-9})
      for (const bool equal : {false, true}) {
        const int64_t rows = 3, stride = V + 5;
        std::vector<float> z(static_cast<size_t>(rows * stride));
        for (size_t i = 0; i < z.size(); ++i) {
          z[i] = static_cast<float>(3 * model::rng_normal({uint64_t(V), 4}, i));
          if (equal) z[i] = std::round(z[i]);
        }
        z[size_t(stride) + 1] = -std::numeric_limits<float>::infinity();
        const DeviceBuffer dz = device(z), p(rows * V * 4);
        sampling_distribution_cuda_simt(
            {rows, V, 0.8, top_p, dz.as<float>(), stride, p.as<float>()}, cuda_stream());
        const auto got = host<float>(p);
        for (int64_t r = 0; r < rows; ++r) {
          const auto want = ref::sampling_distribution(
              std::span<const float>(z.data() + r * stride, size_t(V)), 0.8, top_p);
          for (int64_t i = 0; i < V; ++i) {
            ASSERT_EQ(got[size_t(r * V + i)] > 0, want[size_t(i)] > 0)
                << V << " " << top_p << " " << i;
            ASSERT_NEAR(got[size_t(r * V + i)], want[size_t(i)], 4e-6 * want[size_t(i)]);
          }
        }
      }
  EXPECT_THROW(sampling_distribution_cuda_simt({1, 5, 0.0, 0.5}, cuda_stream()), Error);
}

}  // namespace
}  // namespace v3b::kern
