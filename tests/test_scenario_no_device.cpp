// The four scenarios with --device cuda where there is no device: rows that say so, one line, exit code 4 (DESIGN 4), and
// what needs no device is there.
#include <gtest/gtest.h>

#include <cstdlib>
#include <filesystem>
#include <fstream>

#include "kernels/core/cuda.h"
#include "model/error.h"
#include "reports/csv.h"
#include "reports/table.h"
#include "scenarios/device.h"
#include "scenarios/expert_load.h"
#include "scenarios/kv_cache.h"
#include "scenarios/mtp_decoding.h"
#include "scenarios/yarn_perplexity.h"

namespace v3b {
namespace {

namespace fs = std::filesystem;

class NoDevice : public ::testing::Test {
 protected:
  void SetUp() override {
    unsetenv("V3BENCH_CUDA");
    if (kern::cuda_usable()) GTEST_SKIP() << "there is a device";
    dir_ = (fs::temp_directory_path() /
            ("v3b_test_no_device_" +
             std::string(::testing::UnitTest::GetInstance()->current_test_info()->name())))
               .string();
    fs::remove_all(dir_);
    fs::create_directories(dir_);
    std::ofstream text(dir_ + "/text.txt");
    for (int i = 0; i < 40; ++i) text << "Line " << i * 37 % 101 << " of a text that repeats.\n";
  }
  template <class Options>
  Options options() const {
    Options o;
    o.out = dir_ + "/out";
    o.model = "random:train";
    o.text = dir_ + "/text.txt";
    o.print_table = false;
    scen::choose_device(o, "cuda");
    return o;
  }
  // One clear line, and rows of `file` with a status that says it; run twice: they are made again, not kept.
  template <class Options>
  rep::CsvTable missing(int (*run)(const Options&), Options o, const std::string& file) {
    for (const bool resume : {false, true}) {
      o.resume = resume;
      try {
        run(o);
        ADD_FAILURE() << file << ": no error";
      } catch (const Error& e) {
        EXPECT_EQ(e.code(), ExitCode::nothing_ran);
        EXPECT_EQ(std::string(e.what()).find('\n'), std::string::npos);
        EXPECT_NE(std::string(e.what()).find(kern::cuda_device().reason), std::string::npos);
      }
    }
    auto t = rep::read_csv(o.out + "/" + file);
    int said = 0;
    for (size_t i = 0; i < t.rows.size(); ++i) {
      const std::string& status = t.cell(i, "status");
      if (status != "not_built" && status != "no_device") continue;
      ++said;
      EXPECT_EQ(t.cell(i, "device"), "cuda");
      EXPECT_EQ(t.cell(i, "reason"), kern::cuda_device().reason);
    }
    EXPECT_GT(said, 0) << file;
    EXPECT_FALSE(rep::render_table(o.out + "/" + file).empty());
    return t;
  }
  std::string dir_;
};

TEST_F(NoDevice, MtpDecoding) {
  auto o = options<scen::MtpOptions>();
  o.prompts = 1;
  o.prompt_tokens = 8;
  o.max_new = 8;
  EXPECT_EQ(missing(scen::run_mtp_decoding, o, "mtp_decoding.csv").rows.size(), 1u);
}

TEST_F(NoDevice, KvCacheFormulasAreThere) {
  auto o = options<scen::KvCacheOptions>();
  o.presets = {"v3"};
  o.forms = {"mla"};
  o.dtypes = {"bf16"};
  o.contexts = {4096};
  o.memory_gb = {80};
  o.run_contexts = {64};
  o.step_presets = {"v3"};
  o.step_contexts = {64};
  const auto t = missing(scen::run_kv_cache, o, "kv_cache.csv");
  ASSERT_EQ(t.rows.size(), 4u);  // fit, size, run, step
  for (size_t i = 0; i < t.rows.size(); ++i) {
    EXPECT_GT(t.number(i, "bytes_per_token").value_or(0), 0);
    EXPECT_EQ(t.cell(i, "status") == "ok", t.cell(i, "kind") == "fit");
    EXPECT_EQ(t.cell(i, "process_bytes"), "");
  }
}

TEST_F(NoDevice, ExpertLoad) {
  auto o = options<scen::ExpertLoadOptions>();
  o.window = 16;
  o.batch_windows = 1;
  o.tokens = o.capacity_tokens = 16;
  o.strategies = {"bias"};
  o.routes = {"uniform"};
  o.route_tokens = 2;
  // model, capacity, synthetic; training is the CPU's and says that.
  EXPECT_EQ(missing(scen::run_expert_load, o, "expert_load.csv").rows.size(), 4u);
}

TEST_F(NoDevice, YarnPerplexity) {
  auto o = options<scen::YarnOptions>();
  o.variants = {"none", "yarn"};
  o.factors = {2};
  o.length = 24;
  o.docs = 1;
  o.windows = {12};
  o.window_length = 24;
  EXPECT_EQ(missing(scen::run_yarn_perplexity, o, "yarn_perplexity.csv").rows.size(), 2u);
}

}  // namespace
}  // namespace v3b
