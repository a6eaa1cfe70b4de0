// The harness' own parts: tensors, fills, verdicts, routes, jobs, the run loop, on a toy op (DESIGN
// 3).
#include <gtest/gtest.h>
#include <omp.h>
#include <unistd.h>

#include <cmath>
#include <filesystem>

#include "bench/harness/check.h"
#include "bench/harness/fill_rng.h"
#include "bench/harness/jobs.h"
#include "bench/harness/peaks.h"
#include "bench/harness/run.h"
#include "reports/machine.h"

namespace v3b::bench {
namespace {

using spec::DType;

TEST(Tensor, StartsPoisonedAndGuarded) {
  for (DType t : {DType::f64, DType::f32, DType::bf16, DType::f16, DType::f8e4m3}) {
    const HostTensor y("y", Role::output, t, {3, 5});
    for (int64_t i = 0; i < 15; ++i) EXPECT_TRUE(std::isnan(y.get(i))) << spec::dtype_name(t);
    EXPECT_TRUE(y.canaries_intact());
    EXPECT_EQ(reinterpret_cast<uintptr_t>(y.data()) % 64, 0u);
  }
  const HostTensor i("i", Role::output, DType::i32, {2});
  EXPECT_EQ(i.get(0), double(0x5a5a5a5a));
}

TEST(Tensor, CanariesSeeOneByteOnEitherSide) {
  for (int64_t at : {-1, 15}) {
    HostTensor y("y", Role::output, DType::u8, {15});
    y.as<uint8_t>()[at] ^= 1;
    EXPECT_FALSE(y.canaries_intact()) << at;
  }
}

TEST(Tensor, SetRoundsOnceFromDouble) {
  HostTensor b("b", Role::input, DType::bf16, {1});
  b.set(
      0,
      1.0 + 0x1p-8 +
          0x1p-40);  // just above the middle of two neighbours; through float it would tie to even
  EXPECT_EQ(b.get(0), 1.0 + 0x1p-7);
  b.set(0, 1.0 + 0x1p-8);
  EXPECT_EQ(b.get(0), 1.0);
  HostTensor f("f", Role::input, DType::f8e4m3, {1});
  f.set(0, 1e9);
  EXPECT_EQ(f.get(0), 448);
}

TEST(Tensor, FillsAreTheSameOnEveryThreadCount) {
  uint64_t first[2] = {};
  for (int threads : {1, 2, 3}) {
    omp_set_num_threads(threads);
    HostTensor a("a", Role::input, DType::bf16, {301, 257}),
        b("b", Role::input, DType::f8e4m3, {301, 257});
    a.fill_real(7);
    b.fill_exact(7);
    if (threads == 1) first[0] = tensor_hash(a), first[1] = tensor_hash(b);
    EXPECT_EQ(tensor_hash(a), first[0]);
    EXPECT_EQ(tensor_hash(b), first[1]);
  }
  omp_set_num_threads(omp_get_num_procs());
  // The same bits on every machine (law 12): these three are typed from the definition in
  // fill_rng.h.
  EXPECT_EQ(mix64(0), 0xe220a8397b1dcdafull);
  EXPECT_EQ(mix64(1), 0x910a2dec89025cc1ull);
  HostTensor c("a", Role::input, DType::f32, {64}), d("other", Role::input, DType::f32, {64}),
      e("a", Role::input, DType::f32, {64});
  c.fill_real(7);
  d.fill_real(7);
  e.fill_real(8);
  EXPECT_NE(tensor_hash(c), tensor_hash(d));
  EXPECT_NE(tensor_hash(c), tensor_hash(e));
}

TEST(Tensor, FillsHaveTheRightShape) {
  HostTensor a("a", Role::input, DType::f32, {400, 1000});
  a.fill_real(3, 0.5, false);
  double sum = 0, sum2 = 0;
  for (double v : a.to_doubles()) sum += v, sum2 += v * v;
  EXPECT_NEAR(sum / 4e5, 0, 5e-3);
  EXPECT_NEAR(std::sqrt(sum2 / 4e5), 0.5, 5e-3);
  a.fill_real(3, 0.5, true);
  sum2 = 0;
  for (double v : a.to_doubles()) sum2 += v * v;
  EXPECT_GT(std::sqrt(sum2 / 4e5), 0.6) << "no outlier channels";
  a.fill_exact(3);
  bool seen[7] = {};
  for (double v : a.to_doubles()) {
    ASSERT_EQ(v, std::floor(v));
    ASSERT_LE(std::fabs(v), 3);
    seen[static_cast<int>(v) + 3] = true;
  }
  for (bool s : seen) EXPECT_TRUE(s);
}

// ---- jobs
TEST(Jobs, RangesAndLists) {
  EXPECT_EQ(parse_int_list("1024:8192:*2", "x"), (std::vector<int64_t>{1024, 2048, 4096, 8192}));
  EXPECT_EQ(parse_int_list("1:10:3,20,5:6", "x"), (std::vector<int64_t>{1, 4, 7, 10, 20, 5, 6}));
  EXPECT_EQ(parse_int_list("1:9:+4", "x"), (std::vector<int64_t>{1, 5, 9}));
  for (const char* bad : {"", "a", "1:2:0", "4:2", "0:8:*2", "1:8:*1", "1:2:3:4", "1,,2", "1.5"})
    EXPECT_THROW(parse_int_list(bad, "x"), Error) << bad;
  EXPECT_EQ(expand_case("T=1:4:*2,d=7"),
            (std::vector<std::string>{"T=1,d=7", "T=2,d=7", "T=4,d=7"}));
}

// ---- the run loop, on y = 2x
struct ToyShape {
  int64_t n = 1000;
  DType dtype = DType::f32;
  template <class S, class V>
  static void visit(S& s, V&& v) {
    v("n", s.n), v("dtype", s.dtype);
  }
};
int g_runs = 0;  // of "breaks_later"
bool g_reference_ran = false, g_kernel_ran_first = true;
double g_flop = 1000, g_bytes = 8, g_written = 0;  // bytes: of an element

struct Toy {
  static constexpr const char* name = "toy";
  static constexpr bool exact_fill = true;
  using Shape = ToyShape;
  struct Data {
    HostTensor x, y;
    std::vector<HostTensor*> tensors() { return {&x, &y}; }
  };
  static std::unique_ptr<Data> make(const Shape& s, Fill fill, uint64_t seed) {
    auto d = std::make_unique<Data>();
    d->x = HostTensor("x", Role::input, s.dtype, {s.n});
    d->y = HostTensor("y", Role::output, s.dtype, {s.n});
    if (fill == Fill::exact)
      d->x.fill_exact(seed);
    else
      d->x.fill_real(seed);
    return d;
  }
  static Expected reference(const Data& d) {
    g_reference_ran = true;
    auto y = d.x.to_doubles();
    for (double& v : y) v *= 2;
    return {{{.name = "y", .values = std::move(y)}}};
  }
  static Cost cost(const Shape& s) {
    const double n = static_cast<double>(s.n);
    return {g_flop, g_bytes * n, "f32", g_written * n};
  }
  static Tolerance tolerance(const Shape&, Fill fill, const std::string&) {
    return fill == Fill::exact ? Tolerance{} : Tolerance{.rel_fro = 1e-6, .rel = 1e-6};
  }
  static std::vector<Case<Shape>> cases() {
    return {{{.n = 1000}, Size::quick, false, CacheState::hot},
            {{.n = 3}, Size::quick, true},
            {{.n = 5000}, Size::full}};
  }
  static void twice(Data& d) {
    for (int64_t i = 0; i < d.x.numel(); ++i) d.y.as<float>()[i] = 2 * d.x.as<float>()[i];
  }
  static std::vector<Impl<Toy>> impls() {
    std::vector<Impl<Toy>> v;
    v.push_back({"cpu_good", nullptr, [](Data& d) {
                   return Runner{.run =
                                     [&d] {
                                       g_kernel_ran_first = g_kernel_ran_first && !g_reference_ran;
                                       twice(d);
                                     },
                                 .resolved_isa = "baseline"};
                 }});
    v.push_back({"cpu_never",
                 [](const Shape&) {
                   return Support{Support::State::unsupported, "needs a miracle"};
                 },
                 [](Data&) { return Runner{}; }});
    v.push_back({"cuda_toy",
                 [](const Shape&) {
                   return Support{Support::State::no_device, "no GPU"};
                 },
                 [](Data&) { return Runner{}; }});
    v.push_back({"cpu_throws", nullptr,
                 [](Data&) -> Runner { throw Error(ExitCode::bad_input, "no", "toy"); }});
    v.push_back({"cpu_breaks_later", nullptr, [](Data& d) {
                   return Runner{.run = [&d] {
                     twice(d);
                     if (++g_runs > 4) d.y.as<float>()[1] = 17;
                   }};
                 }});
    return v;
  }
};

std::map<std::string, rep::Row> run_toy(bool time, Selection selection = {},
                                        rep::CsvWriter* out = nullptr) {
  g_runs = 0;
  Ops ops;
  ops.push_back(make_op<Toy>());
  RunOptions o{.time = time};
  o.timing.job_seconds = 0.02;
  std::map<std::string, rep::Row> rows;
  run_jobs(select_jobs(ops, selection), o, out,
           [&](const rep::Row& r) { rows[r.impl + "/" + r.case_text] = r; });
  return rows;
}

TEST(RunLoop, KernelBeforeReference) {
  g_reference_ran = false, g_kernel_ran_first = true;
  Ops ops;
  ops.push_back(make_op<Toy>());
  CaseChecker checker(*ops[0], ops[0]->cases()[0], 1);
  EXPECT_EQ(checker.check("cpu_good").status, "passed");
  EXPECT_TRUE(g_reference_ran);
  // The real fill's run came before any reference; the exact fill's reference is a second one by
  // design.
}

TEST(RunLoop, EveryJobGivesARow) {
  const auto rows = run_toy(false);
  EXPECT_EQ(rows.size(), 10u) << "two cases of five implementations";
  const auto& good = rows.at("toy.cpu_good/n=1000,dtype=f32");
  EXPECT_EQ(good.status, "passed") << good.reason;
  EXPECT_FALSE(good.timed());
  EXPECT_NE(good.repro.find("--op toy --impl cpu_good --case n=1000,dtype=f32"), std::string::npos);
  EXPECT_EQ(rows.at("toy.cpu_never/n=3,dtype=f32").status, "unsupported");
  EXPECT_EQ(rows.at("toy.cpu_never/n=3,dtype=f32").reason, "needs a miracle");
  EXPECT_EQ(rows.at("toy.cuda_toy/n=3,dtype=f32").status, "no_device");
  EXPECT_EQ(rows.at("toy.cpu_throws/n=3,dtype=f32").status, "error");
}

TEST(RunLoop, OnlyWhatPassedIsTimedAndWhatBreaksLaterFails) {
  const auto rows = run_toy(true);
  const auto& good = rows.at("toy.cpu_good/n=1000,dtype=f32");
  EXPECT_EQ(good.status, "passed") << good.reason;
  ASSERT_TRUE(good.timed());
  EXPECT_GE(*good.samples, 5);
  EXPECT_LE(*good.min_us, *good.q1_us);
  EXPECT_LE(*good.q1_us, *good.median_us);
  EXPECT_LE(*good.median_us, *good.q3_us);
  EXPECT_FALSE(good.stop_reason.empty());
  EXPECT_EQ(good.cache_state, "hot");
  const auto& broken = rows.at("toy.cpu_breaks_later/n=1000,dtype=f32");
  EXPECT_EQ(broken.status, "failed");
  EXPECT_NE(broken.reason.find("after timing: y[1]"), std::string::npos) << broken.reason;
  EXPECT_FALSE(broken.timed());
  EXPECT_FALSE(rows.at("toy.cpu_good/n=3,dtype=f32").timed()) << "check-only";
  EXPECT_EQ(rows.at("toy.cpu_good/n=3,dtype=f32").stop_reason, "check_only");
}

TEST(RunLoop, ColdCachesAreTimedToo) {
  const auto rows = run_toy(true, {.impls = {"cpu_good"}, .cache = "cold"});
  const auto& r = rows.at("toy.cpu_good/n=1000,dtype=f32");
  EXPECT_TRUE(r.timed()) << r.reason;
  EXPECT_EQ(r.cache_state, "cold");
}

TEST(RunLoop, FasterThanThePeakIsSuspect) {
  g_flop = 1e15;
  const auto rows = run_toy(true, {.impls = {"cpu_good"}});
  g_flop = 1000;
  const auto& r = rows.at("toy.cpu_good/n=1000,dtype=f32");
  EXPECT_EQ(r.status, "suspect");
  EXPECT_EQ(r.roof, "f32");
  EXPECT_GT(*r.pct_of_roof, 110);
}

TEST(RunLoop, WrittenBytesAreJudgedByTheCopyBandwidth) {
  for (const auto& [written, roof] : {std::pair{0.0, "read"}, {1.0, "read+copy"}, {4.0, "copy"}}) {
    g_written = written, g_bytes = 8;
    const Selection cold{.impls = {"cpu_good"}, .cache = "cold"};
    const auto& rows = run_toy(true, cold);
    EXPECT_EQ(rows.at("toy.cpu_good/n=1000,dtype=f32").roof, roof);
    g_bytes = 2e5, g_written = written * g_bytes / 8;
    const auto fast = run_toy(true, cold);
    const auto& r = fast.at("toy.cpu_good/n=1000,dtype=f32");
    EXPECT_EQ(r.status, "suspect") << roof;
    EXPECT_EQ(r.roof, roof);
    EXPECT_NE(r.reason.find(std::string("measured ") + roof + " peak"), std::string::npos)
        << r.reason;
  }
  g_bytes = 8, g_written = 0;
}

TEST(RunLoop, MostlyWrittenBytesAreNoFasterThanStoresAlone) {
  g_bytes = 2e5, g_written = 1.9e5;
  const auto rows = run_toy(true, {.impls = {"cpu_good"}, .cache = "cold"});
  g_bytes = 8, g_written = 0;
  const auto& r = rows.at("toy.cpu_good/n=1000,dtype=f32");
  const auto& peaks = rep::machine_card().peaks;
  ASSERT_TRUE(peaks.contains("write_gb_s") && peaks.contains("copy_gb_s"));
  // Which of the two binds is the machine's; the share is never below what the copy alone would give.
  EXPECT_TRUE(r.roof == "write" || r.roof == "copy") << r.roof;
  EXPECT_EQ(r.status, "suspect");
}

TEST(Tensor, WhatDoesNotFitIntoMemoryIsRefused) {
  EXPECT_THROW(HostTensor("x", Role::input, DType::f32, {int64_t{1} << 40, int64_t{1} << 40}),
               TooLarge);
}

TEST(RunLoop, ResumeSkipsFinishedRows) {
  const std::string path =
      std::filesystem::temp_directory_path() / ("v3b_toy_" + std::to_string(getpid()) + ".csv");
  {
    rep::CsvWriter out(path, rep::bench_columns(), rep::bench_key_columns());
    EXPECT_EQ(run_toy(false, {.impls = {"cpu_good"}}, &out).size(), 2u);
  }
  {
    rep::CsvWriter out(path, rep::bench_columns(), rep::bench_key_columns(), true);
    const auto rows = run_toy(false, {.impls = {"cpu_good", "cpu_never"}}, &out);
    EXPECT_EQ(rows.size(), 2u);
    EXPECT_EQ(rows.count("toy.cpu_good/n=3,dtype=f32"), 0u);
  }
  EXPECT_EQ(rep::read_csv(path).rows.size(), 4u);
  std::filesystem::remove(path);
}

TEST(RunLoop, SelectionErrorsAreUsage) {
  Ops ops;
  ops.push_back(make_op<Toy>());
  for (const Selection& s : std::vector<Selection>{{.ops = {"tay"}},
                                                   {.impls = {"cpu_gud"}},
                                                   {.cases = {"n=1"}},
                                                   {.filter = "("},
                                                   {.ops = {"toy"}, .cases = {"m=1"}},
                                                   {.ops = {"toy"}, .cases = {"n=x"}}}) {
    try {
      select_jobs(ops, s);
      ADD_FAILURE() << "accepted";
    } catch (const Error& e) {
      EXPECT_EQ(e.code(), ExitCode::usage) << e.what();
    }
  }
  EXPECT_TRUE(select_jobs(ops, {.filter = "nothing_like_this"}).empty());
  EXPECT_EQ(select_jobs(ops, {.filter = "good/n=3"}).size(), 1u);
  EXPECT_EQ(select_jobs(ops, {.size = Size::full}).size(), 3u);
  EXPECT_EQ(select_jobs(ops, {.ops = {"toy"}, .cases = {"n=1:8:*2"}}).size(), 4u);
}

TEST(Samples, Quartiles) {
  const SampleStats s = summarize({4, 1, 3, 2, 5});
  EXPECT_EQ(s.min, 1);
  EXPECT_EQ(s.q1, 2);
  EXPECT_EQ(s.median, 3);
  EXPECT_EQ(s.q3, 4);
  EXPECT_EQ(s.count, 5);
  EXPECT_NEAR(s.stdrel_pct, 100 * std::sqrt(2.5) / 3, 1e-9);
}

TEST(Peaks, EveryProbeGivesARate) {
  const Peaks p = probe_all_peaks(1);
  for (const char* key : {"read_gb_s", "copy_gb_s", "write_gb_s", "f32_gflop_s", "f64_gflop_s"})
    EXPECT_GT(p.at(key), 0.1) << key;
  EXPECT_GT(roof_rate(p, "bf16"), 0) << "falls back to f32";
  EXPECT_EQ(roof_rate(p, "tf32"), 0);
}

}  // namespace
}  // namespace v3b::bench
