// The harness' device side without a device: a fake one whose implementations run out of memory, fault, or die. What must
// hold: every job has its row, the sweep goes on or ends with the job's name, --resume continues behind it.
#include <gtest/gtest.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cmath>
#include <csignal>
#include <cstdlib>
#include <filesystem>
#include <fstream>

#include "bench/harness/hardware_runs.h"
#include "bench/harness/nvml.h"
#include "bench/harness/run.h"
#include "bench/harness/running_marker.h"
#include "kernels/core/cuda_error.h"

namespace v3b::bench {
namespace {

// y = 2x. The fake device's memory is counted in prepared runners.
struct FakeShape {
  int64_t n = 1000;
  template <class S, class V>
  static void visit(S& s, V&& v) {
    v("n", s.n);
  }
};
int g_live = 0, g_live_most = 0, g_capacity = 1 << 30, g_runs_of_cuda_a = 0;
int g_fault_at_run = -1;   // of cuda_a, counted from 0
int64_t g_faulting_n = 0;  // the case in which it faults
bool g_die = false;

struct Mirror {
  std::vector<float> y;  // the device's output
  Mirror() {
    if (g_live >= g_capacity) throw kern::CudaOutOfMemory(4096);
    ++g_live;
    g_live_most = std::max(g_live_most, g_live);
  }
  ~Mirror() { --g_live; }
};

struct Fake {
  static constexpr const char* name = "fake";
  using Shape = FakeShape;
  struct Data {
    HostTensor x, y;
    std::vector<HostTensor*> tensors() { return {&x, &y}; }
  };
  static std::unique_ptr<Data> make(const Shape& s, Fill, uint64_t seed) {
    auto d = std::make_unique<Data>();
    d->x = HostTensor("x", Role::input, spec::DType::f32, {s.n});
    d->y = HostTensor("y", Role::output, spec::DType::f32, {s.n});
    d->x.fill_real(seed);
    return d;
  }
  static Expected reference(const Data& d) {
    auto y = d.x.to_doubles();
    for (double& v : y) v *= 2;
    return {{{.name = "y", .values = std::move(y)}}};
  }
  static Cost cost(const Shape& s) { return {1.0, 8.0 * static_cast<double>(s.n), "f32"}; }
  static Tolerance tolerance(const Shape&, Fill, const std::string&) {
    return {.rel_fro = 1e-6, .rel = 1e-6};
  }
  static std::vector<Case<Shape>> cases() {
    return {{{.n = 1000}, Size::quick}, {{.n = 2000}, Size::quick}, {{.n = 3000}, Size::quick}};
  }
  static Runner cuda(Data& d, bool can_fault) {
    auto m = std::make_shared<Mirror>();
    const auto kernel = [m, &d, can_fault] {
      const int64_t n = d.x.numel();
      if (can_fault && g_die && n == g_faulting_n) raise(SIGKILL);
      if (can_fault && n == g_faulting_n && g_runs_of_cuda_a++ == g_fault_at_run)
        throw kern::CudaFault("kernels on the stream", "cudaErrorIllegalAddress");
      m->y.resize(static_cast<size_t>(n));
      for (int64_t i = 0; i < n; ++i) m->y[static_cast<size_t>(i)] = 2 * d.x.as<float>()[i];
    };
    Runner r;
    r.run = kernel;
    r.timed_run = [kernel] {
      kernel();
      return 1e-5;
    };
    r.poison = [m] { m->y.assign(m->y.size(), NAN); };
    r.fetch = [m, &d] { std::copy(m->y.begin(), m->y.end(), d.y.as<float>()); };
    r.resolved_isa = "fake";
    return r;
  }
  static std::vector<Impl<Fake>> impls() {
    std::vector<Impl<Fake>> v;
    v.push_back({"cpu_simple", nullptr, [](Data& d) {
                   return Runner{.run = [&d] {
                     for (int64_t i = 0; i < d.x.numel(); ++i)
                       d.y.as<float>()[i] = 2 * d.x.as<float>()[i];
                   }};
                 }});
    v.push_back({"cuda_a", nullptr, [](Data& d) { return cuda(d, true); }});
    v.push_back({"cuda_b", nullptr, [](Data& d) { return cuda(d, false); }});
    return v;
  }
};

class Device : public testing::Test {
 protected:
  void SetUp() override {
    g_live = g_live_most = g_runs_of_cuda_a = 0;
    g_capacity = 1 << 30;
    g_fault_at_run = -1;
    g_faulting_n = 2000;
    g_die = false;
    path_ = std::filesystem::temp_directory_path() /
            ("v3b_device_" + std::to_string(getpid()) + ".csv");
    std::filesystem::remove(path_);
  }
  void TearDown() override { std::filesystem::remove(path_); }

  std::unique_ptr<rep::CsvWriter> open(bool time, bool resume) {
    std::vector<std::string> keys = rep::bench_key_columns();
    keys.emplace_back("params");
    using Texts = std::set<std::string>;
    return std::make_unique<rep::CsvWriter>(
        path_, rep::bench_columns(), keys, resume, time ? "stop_reason" : "status",
        time ? Texts{""} : Texts{"failed", "error", "suspect"},
        [](const rep::Record& r) { return r.text("stop_reason") == rep::kFaulted; });
  }
  std::map<std::string, rep::Row> run(bool time, const Selection& selection = {},
                                      rep::CsvWriter* out = nullptr, bool resume = false) {
    Ops ops;
    ops.push_back(make_op<Fake>());
    RunOptions o{.time = time, .resume = resume};
    o.timing.job_seconds = 0.01;
    o.suspect_margin = 1e9;
    std::map<std::string, rep::Row> rows;
    summary_ = run_jobs(select_jobs(ops, selection), o, out,
                        [&](const rep::Row& r) { rows[r.impl + "/" + r.case_text] = r; });
    return rows;
  }
  std::map<std::string, rep::BenchRow> on_disk() {
    std::map<std::string, rep::BenchRow> rows;
    for (const auto& b : rep::read_bench_csv(path_)) rows[b.row.impl + "/" + b.row.case_text] = b;
    return rows;
  }
  std::string path_;
  RunSummary summary_;
};

TEST_F(Device, BothDevicesOfACaseAreTimedAndJudged) {
  auto out = open(true, false);
  const auto rows = run(true, {.filter = "n=1000"}, out.get());
  for (const char* name : {"fake.cpu_simple/n=1000", "fake.cuda_a/n=1000", "fake.cuda_b/n=1000"}) {
    EXPECT_EQ(rows.at(name).status, "passed") << rows.at(name).reason;
    EXPECT_TRUE(rows.at(name).timed()) << name;
  }
  EXPECT_NEAR(*rows.at("fake.cuda_a/n=1000").median_us, 10, 1e-9) << "the device's own clock";
  EXPECT_EQ(on_disk().at("fake.cpu_simple/n=1000").device, "cpu");
  EXPECT_EQ(on_disk().at("fake.cuda_a/n=1000").device, device_column("cuda_a"));
  EXPECT_FALSE(rows.at("fake.cpu_simple/n=1000").energy_mj);
  if (nvml().available()) return;
  EXPECT_FALSE(rows.at("fake.cuda_a/n=1000").energy_mj);
  EXPECT_EQ(rows.at("fake.cuda_a/n=1000").throttle, "");
}

TEST_F(Device, OutOfMemoryIsARowAndTheSweepGoesOn) {
  g_capacity = 0;
  for (const bool time : {false, true}) {
    const auto rows = run(time);
    EXPECT_EQ(rows.size(), 9u);
    EXPECT_EQ(summary_.not_run, 6);
    EXPECT_EQ(summary_.passed, 3);
    const auto& r = rows.at("fake.cuda_a/n=3000");
    EXPECT_EQ(r.status, "unsupported");
    EXPECT_NE(r.reason.find("out of device memory"), std::string::npos) << r.reason;
    EXPECT_TRUE(summary_.device_lost_in.empty());
  }
}

TEST_F(Device, WhatDoesNotFitTogetherIsTimedAlone) {
  g_capacity = 1;  // one runner at a time: check works, two implementations on one copy do not
  const auto rows = run(true, {.filter = "n=1000"});
  EXPECT_TRUE(rows.at("fake.cuda_a/n=1000").timed()) << rows.at("fake.cuda_a/n=1000").reason;
  EXPECT_TRUE(rows.at("fake.cuda_b/n=1000").timed()) << rows.at("fake.cuda_b/n=1000").reason;
  EXPECT_EQ(g_live_most, 1);
  EXPECT_EQ(g_live, 0);
}

TEST_F(Device, MemoryThatEndsWithinTheCopiesStillGivesATime) {
  g_capacity = 5;
  const auto rows = run(true, {.impls = {"cuda_a"}, .cache = "cold"});
  for (const auto& [name, r] : rows) EXPECT_TRUE(r.timed()) << name << ": " << r.reason;
  EXPECT_EQ(g_live, 0);
}

TEST_F(Device, AFaultInACheckEndsTheRunAndResumeContinuesBehindIt) {
  for (const bool time : {false, true}) {
    SetUp();
    g_fault_at_run = 0;
    {
      auto out = open(time, false);
      const auto rows = run(time, {.device = "cuda"}, out.get());
      EXPECT_EQ(rows.size(), 3u) << "two of the first case, the faulting one, nothing after it";
      EXPECT_EQ(summary_.device_lost_in, "fake.cuda_a/n=2000");
      EXPECT_EQ(summary_.errors, 1);
    }
    EXPECT_EQ(on_disk().size(), 3u);
    EXPECT_EQ(on_disk().at("fake.cuda_a/n=2000").row.status, "error");
    EXPECT_EQ(on_disk().at("fake.cuda_a/n=2000").row.stop_reason, "fault");
    EXPECT_NE(on_disk().at("fake.cuda_a/n=2000").row.reason.find("cudaErrorIllegalAddress"),
              std::string::npos);
    g_runs_of_cuda_a = 0;  // it would fault again
    auto out = open(time, true);
    const auto rows = run(time, {.device = "cuda"}, out.get(), true);
    EXPECT_EQ(rows.size(), 3u);
    EXPECT_EQ(rows.count("fake.cuda_a/n=2000"), 0u);
    EXPECT_EQ(rows.at("fake.cuda_b/n=2000").status, "passed");
    EXPECT_EQ(summary_.skipped, 3);
    EXPECT_TRUE(summary_.device_lost_in.empty());
    EXPECT_EQ(on_disk().size(), 6u);
  }
}

TEST_F(Device, AFaultWhileTimingIsTheJobsOwn) {
  g_fault_at_run = 3;  // the check passes
  {
    auto out = open(true, false);
    const auto rows = run(true, {.device = "cuda"}, out.get());
    EXPECT_EQ(summary_.device_lost_in, "fake.cuda_a/n=2000");
    EXPECT_EQ(rows.at("fake.cuda_a/n=2000").status, "error");
    EXPECT_EQ(rows.at("fake.cuda_a/n=2000").stop_reason, "fault");
    EXPECT_EQ(rows.at("fake.cuda_b/n=2000").status, "passed");
    EXPECT_FALSE(rows.at("fake.cuda_b/n=2000").timed()) << "its samples are not complete";
    EXPECT_EQ(rows.count("fake.cuda_b/n=3000"), 0u);
  }
  g_runs_of_cuda_a = 0;
  auto out = open(true, true);
  const auto rows = run(true, {.device = "cuda"}, out.get(), true);
  EXPECT_EQ(rows.count("fake.cuda_a/n=2000"), 0u);
  EXPECT_TRUE(rows.at("fake.cuda_b/n=2000").timed());
  EXPECT_TRUE(rows.at("fake.cuda_a/n=3000").timed());
}

TEST_F(Device, AJobThatKillsTheProcessIsARowOfTheNextRun) {
  const pid_t child = fork();
  ASSERT_GE(child, 0);
  if (child == 0) {
    g_die = true;
    auto out = open(false, false);
    run(false, {.device = "cuda"}, out.get());
    _exit(0);
  }
  int status = 0;
  ASSERT_EQ(waitpid(child, &status, 0), child);
  ASSERT_TRUE(WIFSIGNALED(status));
  EXPECT_EQ(on_disk().size(), 2u) << "finished rows are on disk";
  ASSERT_TRUE(std::filesystem::exists(path_ + ".running"));
  auto out = open(false, true);
  const auto rows = run(false, {.device = "cuda"}, out.get(), true);
  EXPECT_EQ(rows.at("fake.cuda_a/n=2000").status, "error");
  EXPECT_NE(rows.at("fake.cuda_a/n=2000").reason.find("process ended"), std::string::npos);
  EXPECT_EQ(rows.at("fake.cuda_b/n=2000").status, "passed");
  EXPECT_EQ(on_disk().size(), 6u);
  EXPECT_FALSE(std::filesystem::exists(path_ + ".running"));
}

TEST_F(Device, AnInterruptionIsNoFaultOfTheJob) {
  RunningMarker marker(path_ + ".running");
  marker.set("fake.cuda_a/n=2000");
  EXPECT_TRUE(std::filesystem::exists(path_ + ".running"));
  RunningMarker::remove_now();  // what the signal handler does
  EXPECT_FALSE(std::filesystem::exists(path_ + ".running"));
}

TEST(GpuState, ThrottleReasonsHaveNames) {
  EXPECT_EQ(throttle_text(0), "none");
  EXPECT_EQ(throttle_text(1), "none") << "idle";
  EXPECT_EQ(throttle_text(0x4 | 0x40 | 0x1), "sw_power_cap+hw_thermal_slowdown");
  EXPECT_EQ(throttle_text(0x4 | 0x1000), "sw_power_cap+0x1000");
}

TEST(GpuState, NvmlThatIsNotThereIsBlank) {
  const Nvml none("0000:01:00.0", "libno-such-nvml.so.1");
  EXPECT_FALSE(none.available());
  EXPECT_NE(none.reason().find("libno-such-nvml.so.1"), std::string::npos);
  EXPECT_FALSE(none.read().sm_clock_mhz);
  EXPECT_FALSE(none.read().throttle_reasons);
  EXPECT_TRUE(none.card().empty());
  EXPECT_FALSE(Nvml("", "libc.so.6").available());
  EXPECT_FALSE(Nvml("0000:01:00.0", "libc.so.6").available()) << "a library without its functions";
}

TEST(GpuState, NvmlIsReadThroughItsCInterface) {
  const Nvml fake("0000:01:00.0", V3B_FAKE_NVML);
  ASSERT_TRUE(fake.available()) << fake.reason();
  const GpuReading r = fake.read();
  EXPECT_EQ(r.sm_clock_mhz, 1755);
  EXPECT_EQ(r.mem_clock_mhz, 2619);
  EXPECT_EQ(r.temperature_c, 41);
  EXPECT_EQ(r.power_w, 350.5);
  EXPECT_EQ(r.throttle_reasons, uint64_t{4});
  EXPECT_EQ(r.energy_mj, 1000);
  EXPECT_EQ(fake.read().energy_mj, 1100);
  const auto card = fake.card();
  EXPECT_EQ(card.at("driver"), "999.1");
  EXPECT_EQ(card.at("power_limit_w"), "700");
  EXPECT_EQ(card.at("ecc"), "on");
  EXPECT_EQ(card.count("max_sm_clock_mhz"), 0u)
      << "a function that is missing leaves its field out";
  EXPECT_FALSE(Nvml("0000:02:00.0", V3B_FAKE_NVML).available());
}

TEST(HardwareRuns, OnlyCudaImplementationsAndOnlyWhatTheFileSays) {
  const std::string csv =
      "impl,gpu,date,commit\nrope.cuda_simt,NVIDIA H100,2026-11-22,abc\n"
      "rope.cuda_simt,NVIDIA A100,2026-11-22,abc\nrope.cuda_simt,NVIDIA H100,2026-11-23,abd\n";
  EXPECT_EQ(hardware_text("rope.cuda_simt", csv), "NVIDIA A100, NVIDIA H100");
  EXPECT_EQ(hardware_text("rope.cuda_simt2", csv), kNotYetOnHardware);
  EXPECT_EQ(hardware_text("rope.cpu_simd", csv), "");
  EXPECT_EQ(hardware_text("rope.cuda_simt", "impl,gpu,date,commit\n"), kNotYetOnHardware);
}

// scripts/cuda_resources.py, on logs as ptxas writes them.
class Resources : public testing::Test {
 protected:
  void SetUp() override {
    dir_ = std::filesystem::temp_directory_path() / ("v3b_resources_" + std::to_string(getpid()));
    std::filesystem::create_directories(dir_);
  }
  void TearDown() override { std::filesystem::remove_all(dir_); }
  void log(const std::string& source, int spilled) {
    std::ofstream(dir_ / (source + ".o")) << "";
    std::ofstream(dir_ / (source + ".o.ptxas"))
        << "ptxas info    : Compiling entry function '_Z6kernelPf' for 'sm_90a'\n"
           "ptxas info    : Function properties for _Z6kernelPf\n"
        << "    16 bytes stack frame, " << spilled << " bytes spill stores, " << spilled
        << " bytes spill loads\nptxas info    : Used 168 registers, used 1 barriers, 1024 bytes "
           "smem\n";
  }
  int run() {
    const std::string command = "python3 " V3B_SOURCE_DIR "/scripts/cuda_resources.py " +
                                dir_.string() + " --out " + dir_.string() + "/r.csv >" +
                                dir_.string() + "/log 2>&1";
    const int status = std::system(command.c_str());
    return WIFEXITED(status) ? WEXITSTATUS(status) : -1;
  }
  std::filesystem::path dir_;
};
TEST_F(Resources, SpillsFailOnlyInTensorCoreFiles) {
  EXPECT_EQ(run(), 1) << "no log at all proves nothing";
  log("rope.cuda_simt.cu", 8);
  log("gemm.cuda_mma.cu", 0);
  EXPECT_EQ(run(), 0);
  const rep::CsvTable t = rep::read_csv(dir_ / "r.csv");
  ASSERT_EQ(t.rows.size(), 2u);
  EXPECT_EQ(t.cell(0, "file"), "gemm.cuda_mma.cu");
  EXPECT_EQ(t.cell(0, "registers"), "168");
  EXPECT_EQ(t.cell(0, "shared_bytes"), "1024");
  EXPECT_EQ(t.cell(0, "stack_bytes"), "16");
  EXPECT_EQ(t.cell(1, "spill_store_bytes"), "8");
  for (const char* tensor :
       {"gemm.cuda_mma.cu", "gemm.cuda_wgmma.cu", "gemm.cuda_cutlass_sm90.cu"}) {
    log(tensor, 4);
    EXPECT_EQ(run(), 1) << tensor;
    log(tensor, 0);
  }
  EXPECT_EQ(run(), 0);
}

}  // namespace
}  // namespace v3b::bench
