// The four scenarios with --device cuda, on the emulated device: rows name the device, the device's own kernels and
// decode loop are what is measured, and what it lacks is rows with a reason.
#include <gtest/gtest.h>

#include <cstdlib>
#include <filesystem>
#include <fstream>

#include "model/error.h"
#include "model/weights.h"
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
constexpr auto kBf16 = spec::DType::bf16;
const bool kEmulated = [] { return setenv("V3BENCH_CUDA", "emulate", 0) == 0; }();

class ScenarioCuda : public ::testing::Test {
 protected:
  void SetUp() override {
    dir_ = (fs::temp_directory_path() /
            ("v3b_test_scenario_cuda_" +
             std::string(::testing::UnitTest::GetInstance()->current_test_info()->name())))
               .string();
    fs::remove_all(dir_);
    fs::create_directories(dir_);
    std::ofstream text(dir_ + "/text.txt");
    for (int i = 0; i < 40; ++i) text << "Line " << i * 37 % 101 << " of a text that repeats.\n";
    // Preset micro over bytes: the emulation takes seconds for a larger one.
    model::ModelConfig c = model::load_preset("micro");
    c.vocab_size = 256;
    std::vector<model::OwnedTensor> tensors;
    const auto w = model::random_weights(c, 3, kBf16);
    for (const auto& [name, view] : model::named_tensors(*w)) {
      const auto* p = static_cast<const std::byte*>(view.data);
      tensors.push_back({name,
                         view.dtype,
                         {view.shape.begin(), view.shape.end()},
                         {p, p + view.numel() * spec::dtype_bytes(view.dtype)}});
    }
    fs::create_directories(dir_ + "/model");
    std::ofstream(dir_ + "/model/config.json") << model::config_to_json(c);
    model::save_safetensors(dir_ + "/model/model.safetensors", tensors);
  }
  template <class Options>
  Options options() const {
    Options o;
    o.out = dir_ + "/out";
    o.model = dir_ + "/model";
    o.text = dir_ + "/text.txt";
    o.print_table = false;
    scen::choose_device(o, "cuda");
    return o;
  }
  static void expect_device(const rep::CsvTable& t) {
    ASSERT_FALSE(t.rows.empty());
    for (size_t i = 0; i < t.rows.size(); ++i) EXPECT_NE(t.cell(i, "device"), "cpu");
  }
  std::string dir_;
};

TEST_F(ScenarioCuda, DeviceChoosesTheBackend) {
  const auto chosen = [](const char* backend, const char* device) {
    scen::CommonOptions o;
    o.backend = backend;
    scen::choose_device(o, device);
    return o.backend;
  };
  EXPECT_EQ(chosen("cpu_bf16", "cuda"), "cuda_bf16");
  EXPECT_EQ(chosen("cpu_f32", "cuda"), "cuda_f32");
  EXPECT_EQ(chosen("cuda_f32", "cuda"), "cuda_f32");
  EXPECT_EQ(chosen("cuda_f32", "cpu"), "cpu_f32");
  EXPECT_EQ(chosen("reference_f64", "cpu"), "reference_f64");
  EXPECT_EQ(chosen("cuda_bf16", ""), "cuda_bf16");
  EXPECT_THROW(chosen("reference_f64", "cuda"), Error);
  EXPECT_THROW(chosen("cpu_bf16", "gpu"), Error);
}

TEST_F(ScenarioCuda, MtpDecodingTimesTheDevicesLoop) {
  auto o = options<scen::MtpOptions>();
  o.drafts = {1, 2};
  o.temperatures = {1};
  o.prompts = 1;
  o.prompt_tokens = 8;
  o.max_new = 5;
  o.forced = {0.5};
  o.text_tokens = 8;
  ASSERT_EQ(scen::run_mtp_decoding(o), 0);
  const std::string path = o.out + "/mtp_decoding.csv";
  auto t = rep::read_csv(path);
  expect_device(t);
  int measured = 0, refused = 0, text = 0;
  for (size_t i = 0; i < t.rows.size(); ++i) {
    if (t.cell(i, "status") == "unsupported") {
      EXPECT_NE(t.cell(i, "reason").find("at most one draft"), std::string::npos);
      ++refused;
      continue;
    }
    EXPECT_EQ(t.cell(i, "status"), "ok");
    EXPECT_EQ(t.cell(i, "backend"), "cuda_bf16");
    text += t.cell(i, "kind") == "text";
    if (t.cell(i, "kind") != "summary") continue;
    ++measured;
    EXPECT_EQ(*t.number(i, "emitted"), 4);  // every step is a replay of the graph
    EXPECT_GE(*t.number(i, "steps"), 2);
    EXPECT_LE(*t.number(i, "steps"), 4);
    for (const char* c : {"base_us", "verify_us", "measured_speedup", "predicted_speedup"})
      EXPECT_GT(t.number(i, c).value_or(-1), 0) << c;
  }
  EXPECT_EQ(measured, 1);
  EXPECT_EQ(refused, 4);  // two drafts, sampling with one and two, the oracle
  EXPECT_EQ(text, 2);     // acceptance on text needs no loop
  EXPECT_NE(rep::render_table(path).find("4 settings not measured"), std::string::npos);
  o.resume = true;
  const auto before = t.rows.size();
  ASSERT_EQ(scen::run_mtp_decoding(o), 0);
  EXPECT_EQ(rep::read_csv(path).rows.size(), before);
}

TEST_F(ScenarioCuda, KvCacheIsDeviceMemory) {
  auto o = options<scen::KvCacheOptions>();
  o.presets = {"tiny-v3"};
  o.forms = {"mla", "mqa"};
  o.dtypes = {"bf16", "fp8"};
  o.contexts = {100};
  o.memory_gb = {1};
  o.run_contexts = {70};
  o.step_presets = {"v2-lite"};
  o.step_contexts = {64};
  ASSERT_EQ(scen::run_kv_cache(o), 0);
  const auto t = rep::read_csv(o.out + "/kv_cache.csv");
  expect_device(t);
  int sizes = 0, runs = 0, steps = 0;
  for (size_t i = 0; i < t.rows.size(); ++i) {
    if (t.cell(i, "kind") == "size" && t.cell(i, "status") == "ok") {
      EXPECT_EQ(t.cell(i, "process_bytes"), t.cell(i, "allocated_bytes"));  // whole pages, no more
      EXPECT_GE(*t.number(i, "allocated_bytes"), *t.number(i, "measured_formula_bytes"));
      ++sizes;
    }
    if (t.cell(i, "kind") == "run") {
      EXPECT_EQ(t.cell(i, "unmeasured_reason"), "");
      EXPECT_GE(*t.number(i, "process_bytes"), *t.number(i, "allocated_bytes"));
      ++runs;
    }
    if (t.cell(i, "kind") == "step" && t.cell(i, "step_status") == "passed") {
      EXPECT_NE(t.cell(i, "step_impl").find(".cuda_mma"), std::string::npos);
      EXPECT_EQ(t.cell(i, "step_isa"), "emulated");
      ++steps;
    }
  }
  EXPECT_GE(sizes, 3);
  EXPECT_EQ(runs, 2);
  EXPECT_EQ(steps, 3);  // MLA in both, MQA in bf16
}

TEST_F(ScenarioCuda, ExpertLoadModelCapacityAndKernel) {
  auto o = options<scen::ExpertLoadOptions>();
  o.window = 16;
  o.batch_windows = 1;
  o.tokens = o.capacity_tokens = 16;
  o.capacity_factors = {1};
  o.drop_policies = {"slot"};
  o.strategies = {"bias"};
  o.routes = {"uniform"};
  o.route_tokens = 2;
  ASSERT_EQ(scen::run_expert_load(o), 0);
  const auto t = rep::read_csv(o.out + "/expert_load.csv");
  std::map<std::string, int> ok;
  double dropped = 0;
  for (size_t i = 0; i < t.rows.size(); ++i) {
    const std::string& part = t.cell(i, "part");
    if (part == "training") {
      EXPECT_EQ(t.cell(i, "device"), "cpu");
      EXPECT_EQ(t.cell(i, "reason"), "training runs on the CPU only");
      continue;
    }
    EXPECT_EQ(t.cell(i, "device"), "cuda_emulated") << part;
    ok[part] += t.cell(i, "status") == "ok";
    dropped += t.number(i, "dropped_pct").value_or(0);
    if (part == "synthetic") {
      EXPECT_EQ(t.cell(i, "impl"), "moe_experts.cuda_mma");
      EXPECT_NE(t.cell(i, "reason").find("emulation"), std::string::npos);  // the layer is large
    }
  }
  EXPECT_GE(ok["model"], 2);
  EXPECT_GE(ok["capacity"], 4);
  EXPECT_EQ(ok.count("synthetic"), 1u);
  EXPECT_GT(dropped, 0);
}

TEST_F(ScenarioCuda, YarnPerplexityAgreesWithTheCpu) {
  auto o = options<scen::YarnOptions>();
  o.backend = "cuda_f32";
  o.variants = {"none", "yarn", "dynamic-ntk"};
  o.factors = {2};
  o.length = 12;
  o.docs = 1;
  o.windows = {6};
  o.window_variants = {"none"};
  o.window_docs = 1;
  o.window_length = 12;
  ASSERT_EQ(scen::run_yarn_perplexity(o), 0);
  const auto device = rep::read_csv(o.out + "/yarn_perplexity.csv");
  expect_device(device);
  scen::choose_device(o, "cpu");
  o.out += "_cpu";
  ASSERT_EQ(scen::run_yarn_perplexity(o), 0);
  const auto cpu = rep::read_csv(o.out + "/yarn_perplexity.csv");
  ASSERT_EQ(device.rows.size(), cpu.rows.size());
  for (size_t i = 0; i < cpu.rows.size(); ++i) {
    EXPECT_EQ(cpu.cell(i, "device"), "cpu");
    EXPECT_NEAR(*device.number(i, "mean_nll"), *cpu.number(i, "mean_nll"), 1e-4);
  }
}

}  // namespace
}  // namespace v3b
