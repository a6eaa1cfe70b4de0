// The kv-cache scenario: V3's published sizes to the byte, the allocator's and the process' own
// figures, what fits, resuming, bad input.
#include <gtest/gtest.h>

#include <cmath>
#include <filesystem>
#include <fstream>
#include <sstream>

#include "model/error.h"
#include "reports/csv.h"
#include "reports/table.h"
#include "scenarios/kv_cache.h"
#include "tests/described_columns.h"

namespace v3b {
namespace {

namespace fs = std::filesystem;

std::string fresh_dir(const std::string& name) {
  const fs::path p = fs::temp_directory_path() / ("v3b_test_kv_" + name);
  fs::remove_all(p);
  return p.string();
}

scen::KvCacheOptions small(const std::string& dir) {
  scen::KvCacheOptions o;
  o.out = dir;
  o.presets = {"v3"};
  o.contexts = {131072};
  o.memory_gb = {80};
  o.measure_memory = o.measure_step = o.print_table = false;
  return o;
}

size_t find_row(const rep::CsvTable& t, const std::string& kind, const std::string& preset,
                const std::string& form, const std::string& dtype) {
  for (size_t i = 0; i < t.rows.size(); ++i)
    if (t.cell(i, "kind") == kind && t.cell(i, "preset") == preset && t.cell(i, "form") == form &&
        t.cell(i, "dtype") == dtype)
      return i;
  ADD_FAILURE() << "no row " << kind << ' ' << preset << ' ' << form << ' ' << dtype;
  return 0;
}

int64_t integer(const rep::CsvTable& t, size_t row, const std::string& column) {
  const std::string& s = t.cell(row, column);
  EXPECT_FALSE(s.empty()) << column;
  return s.empty() ? -1 : std::stoll(s);
}

TEST(KvCache, V3SizesToTheByte) {  // SPEC 0.4
  auto o = small(fresh_dir("v3"));
  o.forms = {"mha", "gqa-16", "gqa-8", "gqa-4", "gqa-2", "mqa", "mla-expanded", "mla"};
  ASSERT_EQ(scen::run_kv_cache(o), 0);
  const auto t = rep::read_csv(o.out + "/kv_cache.csv");
  struct Golden {
    const char* form;
    int64_t elements, layer, token, token_fp8;
  };
  for (const Golden& g : {Golden{"mla-expanded", 40960, 81920, 4997120, 2576640},
                          {"mha", 32768, 65536, 3997696, 2061312},
                          {"gqa-16", 4096, 8192, 499712, 257664},
                          {"gqa-8", 2048, 4096, 249856, 128832},
                          {"gqa-4", 1024, 2048, 124928, 64416},
                          {"gqa-2", 512, 1024, 62464, 32208},
                          {"mqa", 256, 512, 31232, 16104},
                          {"mla", 576, 1152, 70272, 40016}}) {
    const size_t i = find_row(t, "size", "v3", g.form, "bf16"),
                 f = find_row(t, "size", "v3", g.form, "fp8");
    EXPECT_EQ(integer(t, i, "elements_per_token_layer"), g.elements) << g.form;
    EXPECT_EQ(integer(t, i, "bytes_per_token_layer"), g.layer) << g.form;
    EXPECT_EQ(integer(t, i, "bytes_per_token"), g.token) << g.form;
    EXPECT_EQ(integer(t, f, "bytes_per_token"), g.token_fp8) << g.form;
    EXPECT_EQ(integer(t, i, "bytes"), g.token * 131072) << g.form;
  }
  EXPECT_EQ(integer(t, find_row(t, "size", "v3", "mla", "fp8"), "bytes_per_token_layer"), 656);
  EXPECT_EQ(integer(t, find_row(t, "size", "v3", "mla", "bf16"), "bytes"), 9210691584);
  EXPECT_NEAR(*t.number(find_row(t, "size", "v3", "mla", "bf16"), "mha_over_this"), 512.0 / 9,
              1e-12);
  EXPECT_NEAR(*t.number(find_row(t, "size", "v3", "mla-expanded", "bf16"), "this_over_mla"),
              640.0 / 9, 1e-12);
  // 80e9 / (70272 * 64) = 17788.02 pages of 64 tokens.
  EXPECT_EQ(integer(t, find_row(t, "fit", "v3", "mla", "bf16"), "longest_context"), 17788 * 64);
}

TEST(KvCache, V2LiteAndFormsThatDoNotExist) {
  auto o = small(fresh_dir("lite"));
  o.presets = {"v2-lite", "micro"};
  o.forms = {"mla", "mha", "gqa-8"};
  ASSERT_EQ(scen::run_kv_cache(o), 0);
  const auto t = rep::read_csv(o.out + "/kv_cache.csv");
  EXPECT_EQ(integer(t, find_row(t, "size", "v2-lite", "mla", "bf16"), "bytes_per_token"), 31104);
  EXPECT_NEAR(*t.number(find_row(t, "size", "v2-lite", "mla", "bf16"), "mha_over_this"),
              8192.0 / 1152, 1e-12);
  const size_t none = find_row(t, "size", "micro", "gqa-8", "bf16");  // four heads
  EXPECT_EQ(t.cell(none, "status"), "unsupported");
  EXPECT_NE(t.cell(none, "reason").find("8 groups"), std::string::npos);
  EXPECT_EQ(t.cell(none, "bytes"), "");
}

TEST(KvCache, AllocatorAndProcess) {
  // 100 rows in pages of 64: two pages a sequence.
  const auto m = scen::measure_cache(1152, 100, 3, 2, 64, 1 << 30);
  EXPECT_EQ(m.reason, "");
  EXPECT_EQ(m.layers, 3);
  EXPECT_EQ(m.sequences, 2);
  EXPECT_EQ(m.formula_bytes, 100 * 1152 * 3 * 2);
  EXPECT_EQ(m.allocated_bytes, 128 * 1152 * 3 * 2);

  // 64 MiB: resident growth must be what was written, up to a few MiB of page tables' granularity
  // and noise.
  const int64_t row = 4096, context = 4096, layers = 4;
  const auto big = scen::measure_cache(row, context, layers, 1, 64, 1 << 30);
  EXPECT_EQ(big.formula_bytes, row * context * layers);
  EXPECT_EQ(big.allocated_bytes, big.formula_bytes);
  EXPECT_GE(big.process_bytes, big.formula_bytes - (1 << 20));
  EXPECT_LE(big.process_bytes, big.formula_bytes + (16 << 20));

  // A limit of two and a half layers: two are taken; half a layer: nothing, with a reason.
  const auto part = scen::measure_cache(row, context, layers, 8, 64, row * context * 5 / 2);
  EXPECT_EQ(part.layers, 2);
  EXPECT_EQ(part.sequences, 1);
  const auto none = scen::measure_cache(row, context, layers, 1, 64, row * context / 2);
  EXPECT_EQ(none.layers, 0);
  EXPECT_NE(none.reason.find("one layer"), std::string::npos);
}

TEST(KvCache, BackendHoldsWhatTheFormulaSays) {
  scen::CommonOptions o;
  o.model = "random:tiny";
  const auto m = scen::load_model(o);
  // 4 layers of 64 + 16 elements; 100 tokens take two pages.
  const auto a = scen::measure_backend(m, "cpu_bf16", model::KvElem::bf16, 100, 64);
  EXPECT_EQ(a.reason, "");
  EXPECT_EQ(a.formula_bytes, 100 * 4 * 160);
  EXPECT_EQ(a.allocated_bytes, 128 * 4 * 160);
  const auto b = scen::measure_backend(m, "cpu_bf16", model::KvElem::fp8, 128, 64);
  EXPECT_EQ(b.formula_bytes, 128 * 4 * (64 + 4 + 32));
  EXPECT_EQ(b.allocated_bytes, b.formula_bytes);
  const auto c = scen::measure_backend(m, "cpu_f32", model::KvElem::f32, 64, 64);
  EXPECT_EQ(c.allocated_bytes, 64 * 4 * 320);
  EXPECT_NE(scen::measure_backend(m, "cpu_f32", model::KvElem::bf16, 64, 64).reason, "");
  EXPECT_NE(scen::measure_backend(m, "reference_f32", model::KvElem::f32, 64, 64).reason, "");
  EXPECT_THROW(scen::measure_backend(m, "gpu", model::KvElem::f32, 64, 64), Error);
}

TEST(KvCache, MemoryComesBack) {
  const int64_t before = scen::resident_bytes();
  (void)scen::measure_cache(4096, 8192, 4, 1, 64, 1 << 30);  // 128 MiB
  EXPECT_LT(scen::resident_bytes() - before, 32 << 20);
}

TEST(KvCache, LongestContextIsWholePages) {
  EXPECT_EQ(scen::longest_context(64 * 100, 100, 1, 64), 64);
  EXPECT_EQ(scen::longest_context(64 * 100 - 1, 100, 1, 64), 0);
  EXPECT_EQ(scen::longest_context(64 * 100 * 7, 100, 2, 64), 3 * 64);
}

TEST(KvCache, ResumeKeepsRowsAndAddsMissing) {
  auto o = small(fresh_dir("resume"));
  o.forms = {"mla"};
  o.dtypes = {"bf16"};
  ASSERT_EQ(scen::run_kv_cache(o), 0);
  const auto first = rep::read_csv(o.out + "/kv_cache.csv");
  o.resume = true;
  o.forms = {"mla", "mqa"};
  ASSERT_EQ(scen::run_kv_cache(o), 0);
  const auto second = rep::read_csv(o.out + "/kv_cache.csv");
  ASSERT_EQ(first.rows.size(), 2u);  // one fit, one size
  ASSERT_EQ(second.rows.size(), 4u);
  EXPECT_EQ(second.rows[0], first.rows[0]);
  EXPECT_EQ(second.rows[1], first.rows[1]);
}

TEST(KvCache, TableFromTheFileAlone) {
  auto o = small(fresh_dir("table"));
  o.forms = {"mha", "mla"};
  o.dtypes = {"bf16"};
  ASSERT_EQ(scen::run_kv_cache(o), 0);
  const std::string table = rep::render_table(o.out + "/kv_cache.csv");
  EXPECT_NE(table.find("70272"), std::string::npos);
  EXPECT_NE(table.find("56.9x"), std::string::npos);
  EXPECT_NE(table.find("80.0 GB"), std::string::npos);
}

TEST(KvCache, MeasuredSteps) {
  auto o = small(fresh_dir("steps"));
  o.presets = {"tiny"};
  o.contexts = {64};
  o.forms = {"mha", "gqa-4", "mqa", "mla-expanded", "mla", "gqa-3"};
  o.dtypes = {"bf16", "fp8"};
  o.measure_step = true;
  o.step_presets = {"tiny"};
  o.step_contexts = {70};
  o.step_seconds = 0.01;
  ASSERT_EQ(scen::run_kv_cache(o), 0);
  const auto t = rep::read_csv(o.out + "/kv_cache.csv");
  for (const char* form : {"mha", "gqa-4", "mqa", "mla-expanded", "mla"}) {
    const size_t i = find_row(t, "step", "tiny", form, "bf16");
    EXPECT_TRUE(t.cell(i, "step_status") == "passed" || t.cell(i, "step_status") == "suspect")
        << t.cell(i, "step_reason");
    EXPECT_GT(*t.number(i, "step_median_us"), 0) << form;
    EXPECT_NE(t.cell(i, "step_repro").find("s=70"), std::string::npos) << form;
    EXPECT_EQ(integer(t, i, "bytes"), integer(t, i, "bytes_per_token") * 70) << form;
  }
  EXPECT_GT(*t.number(find_row(t, "step", "tiny", "mla", "fp8"), "step_median_us"), 0);
  for (const auto& [form, dtype] : {std::pair{"mha", "fp8"}, std::pair{"gqa-3", "bf16"}}) {
    const size_t i = find_row(t, "step", "tiny", form, dtype);
    EXPECT_EQ(t.cell(i, "step_status"), "unsupported");
    EXPECT_NE(t.cell(i, "step_reason"), "");
    EXPECT_EQ(t.cell(i, "step_median_us"), "");
  }
  // A step beyond the limit is a row with a reason, not a measurement.
  o.step_gb = 1e-6;
  o.forms = {"mha"};
  o.dtypes = {"bf16"};
  ASSERT_EQ(scen::run_kv_cache(o), 0);
  const auto u = rep::read_csv(o.out + "/kv_cache.csv");
  EXPECT_EQ(u.cell(find_row(u, "step", "tiny", "mha", "bf16"), "step_status"), "unsupported");
}

TEST(KvCache, BadInput) {
  const auto code = [](auto change) {
    auto o = small(fresh_dir("bad"));
    change(o);
    try {
      scen::run_kv_cache(o);
    } catch (const Error& e) {
      EXPECT_EQ(std::string(e.what()).find('\n'), std::string::npos);
      return e.code();
    }
    return ExitCode::ok;
  };
  EXPECT_EQ(code([](auto& o) { o.forms = {"gqa-0"}; }), ExitCode::usage);
  EXPECT_EQ(code([](auto& o) { o.forms = {"gqa-8x"}; }), ExitCode::usage);
  EXPECT_EQ(code([](auto& o) { o.dtypes = {"int4"}; }), ExitCode::usage);
  EXPECT_EQ(code([](auto& o) { o.contexts = {0}; }), ExitCode::usage);
  EXPECT_EQ(code([](auto& o) { o.memory_gb = {std::nan("")}; }), ExitCode::usage);
  EXPECT_NE(code([](auto& o) { o.presets = {"v9"}; }), ExitCode::ok);
  EXPECT_EQ(code([](auto& o) { o.out = "/proc/v3b"; }), ExitCode::cannot_write);
}

TEST(KvCache, EveryColumnIsDescribed) {
  auto o = small(fresh_dir("columns"));
  o.forms = {"mla"};
  ASSERT_EQ(scen::run_kv_cache(o), 0);
  expect_columns_described("kv_cache.csv", rep::read_csv(o.out + "/kv_cache.csv").header);
}

}  // namespace
}  // namespace v3b
