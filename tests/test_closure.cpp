// The trace of the CPU backend and the closure that is made of it.
#include <gtest/gtest.h>

#include <cmath>
#include <cstdlib>
#include <map>

#include "bench/ops/closure.h"
#include "described_columns.h"
#include "kernels/forward/cpu_backend.h"
#include "kernels/forward/trace.h"
#include "model/weights.h"

namespace v3b {
namespace {

using bench::ForwardWhat;

spec::ForwardShape small_shape() {
  spec::ForwardShape s;
  s.L = 3, s.s0 = 70, s.context = spec::ForwardContext::rows;
  return s;
}

std::vector<float> outputs(bench::ForwardData& d, const bench::Runner& r) {
  d.logits.poison();
  d.hidden.poison();
  r.run();
  std::vector<float> v(d.logits.as<float>(), d.logits.as<float>() + d.logits.numel());
  v.insert(v.end(), d.hidden.as<float>(), d.hidden.as<float>() + d.hidden.numel());
  return v;
}

TEST(Trace, RepetitionsChangeNoResult) {
  for (const ForwardWhat what : {ForwardWhat::decode, ForwardWhat::prefill}) {
    spec::ForwardShape s = small_shape();
    if (what == ForwardWhat::prefill) s.T = 40, s.s0 = 0, s.context = spec::ForwardContext::tokens;
    const auto d = bench::make_forward_data(s, what, 3);
    const bench::Runner r = bench::forward_runner(*d, "cpu");
    const std::vector<float> plain = outputs(*d, r);
    for (const float v : plain) ASSERT_TRUE(std::isfinite(v));
    kern::Trace t;
    t.repetitions = 3;
    int before = 0;
    t.before = [&] { ++before; };
    kern::set_trace(&t);
    const std::vector<float> traced = outputs(*d, r);
    kern::set_trace(nullptr);
    EXPECT_EQ(plain, traced);
    EXPECT_EQ(before, 3 * static_cast<int>(t.calls.size()));
    EXPECT_EQ(plain, outputs(*d, r));
  }
}

TEST(Trace, NotesEveryKernelOfADecodeStep) {
  const spec::ForwardShape s = small_shape();
  const auto d = bench::make_forward_data(s, ForwardWhat::decode, 3);
  const bench::Runner r = bench::forward_runner(*d, "cpu");
  kern::Trace t;
  t.repetitions = 2;
  kern::set_trace(&t);
  r.run();
  kern::set_trace(nullptr);
  std::map<std::string, int64_t> calls;
  for (const auto& c : t.calls) {
    ++calls[c.component];
    EXPECT_EQ(c.alone_us.size(), 2U);
    EXPECT_FALSE(c.shape.empty());
  }
  const int64_t moe = s.L - s.L_d;
  EXPECT_EQ(calls["embedding"], 1);
  EXPECT_EQ(calls["mla_decode"], s.L);
  EXPECT_EQ(calls["mla_cache_write"], s.L);
  EXPECT_EQ(calls["rope"], 2 * s.L);
  EXPECT_EQ(calls["mla_absorb"], 2 * s.L);
  EXPECT_EQ(calls["moe_experts"], moe);
  EXPECT_EQ(calls["router"], moe);
  EXPECT_EQ(calls["gemm_router"], moe);
  EXPECT_EQ(calls["add_rows"], moe);
  EXPECT_EQ(calls["swiglu"], s.L_d);
  // a, q_b, o of each layer; gate_up and down of dense ones; the head.
  EXPECT_EQ(calls["gemm"], 3 * s.L + 2 * s.L_d + 1);
  // Input, q_a, kv_a, post of each layer, the router's own in f32, and the final one for logits and hidden rows.
  EXPECT_EQ(calls["rmsnorm"], 4 * s.L + moe + 2);
  EXPECT_EQ(calls["mla_prefill"] + calls["mla_cache_gather"], 0);
}

TEST(Trace, IsOffUnlessSetAndOfItsThread) {
  EXPECT_EQ(kern::current_trace(), nullptr);
  int calls = 0;
  kern::traced("x", {{"n", 1}}, [&] { ++calls; });
  EXPECT_EQ(calls, 1);
}

TEST(Closure, PartsCallsAndRestAddUp) {
  const spec::ForwardShape s = small_shape();
  bench::ClosureOptions o;
  o.rounds = 2, o.repetitions = 2, o.seconds = 0.02;
  const bench::Closure c = bench::measure_closure(s, ForwardWhat::decode, o);
  ASSERT_GT(c.pass_us, 0);
  EXPECT_GE(c.passes, 2);
  double sum = 0, in_pass = 0;
  int64_t decode = 0;
  for (size_t i = 0; i < c.components.size(); ++i) {
    const auto& p = c.components[i];
    EXPECT_GT(p.calls, 0);
    EXPECT_GT(p.median_us, 0);
    EXPECT_GT(p.total_us, 0);
    EXPECT_GT(p.in_pass_us, 0);
    if (i > 0) {
      EXPECT_LE(p.total_us, c.components[i - 1].total_us);
    }
    if (p.component == "mla_decode") decode += p.calls;
    sum += p.total_us, in_pass += p.in_pass_us;
  }
  EXPECT_EQ(decode, s.L);
  EXPECT_DOUBLE_EQ(c.explained_us(), sum);
  EXPECT_DOUBLE_EQ(c.in_pass_us(), in_pass);
  EXPECT_NEAR(c.rest_us() + c.explained_us(), c.pass_us, 1e-9 * c.pass_us);
}

// What is read in place and what is packed must be the same model; FP8 experts must stay FP8 and agree with the
// reference that widens them (check --quick has the case); made-up rows must be the rows of both backends.
TEST(FastWeights, AreTheSameOnEveryRunAndLieInPlace) {
  const model::ModelConfig c = bench::forward_config(small_shape(), false);
  for (const auto t : {spec::DType::bf16, spec::DType::f8e4m3}) {
    const auto a = model::fast_random_weights(c, 5, t), b = model::fast_random_weights(c, 5, t),
               other = model::fast_random_weights(c, 6, t);
    EXPECT_TRUE(a->in_place);
    const auto na = model::named_tensors(*a), nb = model::named_tensors(*b),
               nc = model::named_tensors(*other);
    ASSERT_EQ(na.size(), nb.size());
    for (size_t i = 0; i < na.size(); ++i) {
      EXPECT_EQ(reinterpret_cast<uintptr_t>(na[i].second.data) % 64, 0U) << na[i].first;
      const auto va = model::to_float_vector(na[i].second);
      EXPECT_EQ(va, model::to_float_vector(nb[i].second)) << na[i].first;
      EXPECT_NE(va, model::to_float_vector(nc[i].second)) << na[i].first;
      double sum2 = 0;
      for (const float v : va) sum2 += double(v) * v;
      if (na[i].first.find("norm") != std::string::npos || va.size() < 4096) continue;
      // Scales of N(0, 1/in); FP8 blocks lie between half and one and a half of it.
      const double want = na[i].first.find("embed") != std::string::npos
                              ? 1.0
                              : 1.0 / std::sqrt(double(na[i].second.cols())),
                   got = std::sqrt(sum2 / double(va.size()));
      EXPECT_GT(got, 0.45 * want) << na[i].first;
      EXPECT_LT(got, 1.55 * want) << na[i].first;
    }
  }
}

TEST(FastWeights, PackedAndBorrowedGiveTheSameBits) {
  spec::ForwardShape s = small_shape();
  for (const auto t : {spec::DType::bf16, spec::DType::f8e4m3}) {
    const model::ModelConfig c = bench::forward_config(s, false);
    const auto borrowed = model::fast_random_weights(c, 5, t);
    auto copy = std::make_shared<model::ModelWeights>(*borrowed);
    copy->in_place = false;
    std::vector<float> logits[2];
    int i = 0;
    for (const model::WeightsPtr& w : {model::WeightsPtr(borrowed), model::WeightsPtr(copy)}) {
      const auto backend = kern::make_cpu_backend(w, spec::DType::bf16);
      const auto seq = backend->new_sequence();
      backend->append_rows(*seq, s.s0, bench::forward_rows(s, 3, 0));
      EXPECT_EQ(seq->length(), s.s0);
      const int32_t id = 11;
      logits[i++] = backend->forward(*seq, {&id, 1}, {}).logits;
    }
    EXPECT_EQ(logits[0], logits[1]);
  }
}

TEST(ClosureReport, ColumnsAreDescribed) {
  expect_columns_described(
      "closure.csv", {"op", "case", "params", "dtype", "status", "reason", "component", "shape",
                      "calls", "median_us", "total_us", "share_pct", "in_pass_us"});
}

TEST(PeerScripts, SelfTest) {
  const std::string command =
      "python3 " V3B_SOURCE_DIR "/scripts/peers/selftest.py >/dev/null 2>&1";
  EXPECT_EQ(std::system(command.c_str()), 0) << command;
}

}  // namespace
}  // namespace v3b
