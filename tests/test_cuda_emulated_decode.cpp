// The decode loop that stays on the device against plain decoding step by step: the same tokens, with and without
// drafts, for prompts of unequal lengths, through a captured step.
#include <gtest/gtest.h>

#include <cstdlib>
#include <map>

#include "bench/ops/registry.h"
#include "kernels/forward/cuda_backend.h"
#include "model/error.h"
#include "model/weights.h"
#include "scenarios/backend_factory.h"
#include "scenarios/decode_loop.h"

namespace v3b {
namespace {

const bool kEmulated = [] { return setenv("V3BENCH_CUDA", "emulate", 0) == 0; }();

class DeviceDecode : public testing::TestWithParam<const char*> {
 protected:
  static model::WeightsPtr tiny() {
    static const auto w = model::load_weights(std::string(V3B_SOURCE_DIR) + "/model/tiny-v3");
    return w;
  }
  static std::vector<std::vector<int32_t>> prompts() {
    std::vector<std::vector<int32_t>> p(3);
    const int lengths[3] = {9, 23, 14};
    for (int i = 0; i < 3; ++i)
      for (int t = 0; t < lengths[i]; ++t) p[size_t(i)].push_back(10 + (37 * t + 411 * i) % 3000);
    return p;
  }
};

TEST_P(DeviceDecode, SameTokensAsStepByStep) {
  const bool plain_fma = std::string(GetParam()) == "cuda_f32";  // slow here
  const int64_t kNew = plain_fma ? 4 : 8;
  auto prompts = DeviceDecode::prompts();
  if (plain_fma) prompts.resize(2);
  auto backend = scen::make_backend(GetParam(), tiny(), {});
  std::vector<std::vector<int32_t>> plain;
  std::vector<std::vector<float>> margins;
  for (const auto& prompt : prompts) {
    scen::DecodeOptions o;
    o.max_new = kNew;
    o.stop_at_eos = false;
    const auto r = scen::decode(*backend, prompt, o);
    plain.push_back(r.tokens);
    margins.push_back(r.margins);
  }
  for (const int64_t drafts : {0, 1}) {
    const auto r = kern::cuda_decode_greedy(*backend, prompts, kNew, drafts);
    ASSERT_EQ(r.tokens.size(), plain.size());
    for (size_t b = 0; b < plain.size(); ++b) {
      ASSERT_EQ(r.tokens[b].size(), size_t(kNew)) << drafts;
      // Two rows in one pass round otherwise in bf16: up to the first near-tie (SPEC 1.28).
      const int64_t at = scen::first_difference(r.tokens[b], plain[b]);
      if (at >= 0) {
        EXPECT_LT(margins[b][size_t(at)], 1e-2)
            << "drafts " << drafts << ", sequence " << b << ", token " << at;
      }
    }
    EXPECT_GE(r.steps, drafts == 0 ? kNew - 1 : (kNew - 1) / 2);
    EXPECT_LE(r.accepted, r.drafts);
    EXPECT_EQ(r.emitted, (kNew - 1) * static_cast<int64_t>(prompts.size()));
    EXPECT_GT(r.main_seconds, 0);
    EXPECT_LE(r.main_seconds, r.seconds);
    EXPECT_GT(kern::cuda_cache_bytes(*backend), 0);
    if (drafts == 0) {
      EXPECT_EQ(r.steps, kNew - 1);
      EXPECT_EQ(r.drafts, 0);
    } else {
      EXPECT_GT(r.accepted, 0);  // the trained module is right more often than not
    }
  }
}

// What timed_run() leaves on the device is what run() computes, poisoned in between.
TEST(ForwardOps, TimedPassComputesTheSame) {
  const std::map<std::string, std::string> cases = {{"forward_prefill", "B=2,T=9"},
                                                    {"forward_decode", "B=2,T=1,s0=6"},
                                                    {"mtp_module", "T=3,s0=4"}};
  int compared = 0;
  for (const auto& op : bench::all_ops()) {
    const auto it = cases.find(op->name());
    if (it == cases.end()) continue;
    const auto info = op->parse_case(it->second +
                                     ",L=2,L_d=1,d=32,n_h=2,d_n=8,d_r=8,d_v=8,d_q=16,d_c=16,f=32,m="
                                     "16,E=4,N_s=1,K=2,G=1,M=1,V=64");
    for (const std::string how : {"cuda_backend", "cuda_graph"}) {
      if (how == "cuda_graph" && op->name() != "forward_decode") continue;
      bench::DataHandle data = op->make(info.text, bench::Fill::real, 3);
      const bench::Runner r = op->prepare(how, data);
      const auto outputs = [&] {
        r.fetch();
        std::vector<std::byte> all;
        for (const auto* t : data.tensors) {
          const auto* p = static_cast<const std::byte*>(t->data());
          all.insert(all.end(), p, p + t->bytes());
        }
        return all;
      };
      r.run();
      const auto from_run = outputs();
      for (auto* t : data.tensors)
        if (t->role() == bench::Role::output) t->poison();
      r.poison();
      EXPECT_NE(outputs(), from_run) << op->name() << "." << how;
      EXPECT_GT(r.timed_run(), 0);
      EXPECT_EQ(outputs(), from_run) << op->name() << "." << how;
      ++compared;
    }
  }
  EXPECT_EQ(compared, 4);
}

TEST_P(DeviceDecode, RefusesWhatItCannotDo) {
  auto backend = scen::make_backend(GetParam(), tiny(), {});
  EXPECT_THROW((void)kern::cuda_decode_greedy(*backend, prompts(), 8, 2), Error);
  EXPECT_THROW((void)kern::cuda_decode_greedy(*backend, prompts(), 100000, 0), Error);
  EXPECT_TRUE(kern::cuda_decode_greedy(*backend, {}, 8, 0).tokens.empty());
}

INSTANTIATE_TEST_SUITE_P(Backends, DeviceDecode, testing::Values("cuda_bf16", "cuda_f32"),
                         [](const auto& info) { return std::string(info.param); });

}  // namespace
}  // namespace v3b
