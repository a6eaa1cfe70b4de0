// The yarn-perplexity scenario: rotations of the variants, losses in chunks, pooled figures,
// windows, resuming, bad input.
#include <gtest/gtest.h>

#include <cmath>
#include <filesystem>
#include <fstream>
#include <map>
#include <numeric>
#include <sstream>
#include <vector>

#include "model/error.h"
#include "model/rope_table.h"
#include "reports/table.h"
#include "scenarios/backend_factory.h"
#include "scenarios/yarn_perplexity.h"
#include "tests/described_columns.h"

namespace v3b {
namespace {

namespace fs = std::filesystem;
using scen::context_variant;

constexpr int64_t kV = 64;  // vocabulary of micro

model::ModelConfig tiny(int64_t L = 32) {
  auto c = model::load_preset("micro");
  c.max_position_embeddings = L;
  return c;
}

std::vector<int32_t> some_ids(int64_t n) {
  std::vector<int32_t> ids;
  for (int64_t i = 0; i < n; ++i) ids.push_back(static_cast<int32_t>((i * i * 7 + i * 3) % 61));
  return ids;
}

model::RopeFreqs freqs(const scen::ContextVariant& v, int64_t l) {
  auto c = tiny();
  c.rope_scaling = v.scaling;
  return model::rope_freqs(c, v.flags, l);
}

TEST(YarnVariants, AllEqualBaseAtFactorOne) {  // SPEC 1.4, identities
  const auto base = freqs(context_variant("none", 32, 1), 32);
  for (const auto& name : scen::context_variant_names()) {
    const auto f = freqs(context_variant(name, 32, 1), 32);
    for (size_t i = 0; i < base.inv_freq.size(); ++i)
      EXPECT_NEAR(f.inv_freq[i], base.inv_freq[i], 1e-15) << name;
    EXPECT_NEAR(f.softmax_scale, base.softmax_scale, 1e-15) << name;
    EXPECT_NEAR(f.cos_sin_multiplier, 1, 1e-15) << name;
  }
}

TEST(YarnVariants, TheyDifferAtFactorEight) {
  std::vector<model::RopeFreqs> all;
  for (const auto& name : scen::context_variant_names())
    all.push_back(freqs(context_variant(name, 4096, 8), 32768));
  for (size_t a = 0; a < all.size(); ++a)
    for (size_t b = 0; b < a; ++b) {
      // Two pairs are the same at l = s L by definition: dynamic NTK with alpha = 1 is NTK, dynamic
      // YaRN is YaRN.
      const auto& names = scen::context_variant_names();
      const bool equal = (names[a] == "dynamic-ntk" && names[b] == "ntk") ||
                         (names[a] == "dynamic-yarn" && names[b] == "yarn");
      const bool same = all[a].inv_freq == all[b].inv_freq &&
                        all[a].softmax_scale == all[b].softmax_scale &&
                        all[a].cos_sin_multiplier == all[b].cos_sin_multiplier;
      EXPECT_EQ(same, equal) << names[a] << " and " << names[b];
    }
}

TEST(YarnVariants, DynamicAtALengthIsStatic) {
  for (const char* name : {"dynamic-ntk", "dynamic-ntk-alpha", "dynamic-yarn"})
    for (const int64_t l : {1, 31, 32, 33, 64, 100, 512}) {
      const auto v = context_variant(name, 32, 4);
      const auto dynamic = freqs(v, l), fixed = freqs(scen::at_length(v, l), 9999);
      EXPECT_EQ(dynamic.inv_freq, fixed.inv_freq) << name << " at " << l;
      EXPECT_EQ(dynamic.softmax_scale, fixed.softmax_scale) << name << " at " << l;
      EXPECT_EQ(dynamic.cos_sin_multiplier, fixed.cos_sin_multiplier) << name << " at " << l;
    }
}

TEST(YarnVariants, V3sYarnIsThePublishedOne) {  // SPEC Appendix A
  auto c = model::load_preset("v3");
  const auto published = model::rope_freqs(c, {}, 163840);
  c.rope_scaling = context_variant("yarn", 4096, 40).scaling;
  const auto ours = model::rope_freqs(c, {}, 163840);
  EXPECT_EQ(ours.inv_freq, published.inv_freq);
  EXPECT_EQ(ours.softmax_scale, published.softmax_scale);
  EXPECT_EQ(ours.cos_sin_multiplier, published.cos_sin_multiplier);
}

TEST(YarnVariants, BadOnesAreRefused) {
  EXPECT_THROW(context_variant("yarnn", 32, 8), Error);
  EXPECT_THROW(context_variant("yarn", 32, 0.5), Error);
  EXPECT_THROW(context_variant("yarn", 32, std::nan("")), Error);
}

TEST(YarnLosses, ChunksMakeNoDifference) {
  const auto w = model::random_weights(tiny(), 5, spec::DType::f32);
  const auto ids = some_ids(101);
  for (const char* name : {"none", "yarn", "pi"}) {
    const auto v = context_variant(name, 32, 4);
    model::BackendOptions b;
    b.max_context = 128;
    const auto backend = scen::make_backend("reference_f64", scen::with_scaling(w, v.scaling), b);
    const auto sequence = backend->new_sequence();
    model::ForwardOptions all;
    all.logits = model::LogitsOf::all;
    const auto whole = scen::sequence_losses(backend->forward(*sequence, ids, all), kV, ids);
    const auto chunks = scen::range_losses(*backend, ids, 0, 100, 17);
    const auto tail = scen::range_losses(*backend, ids, 40, 100, 32);
    ASSERT_EQ(chunks.size(), 100u);
    ASSERT_EQ(tail.size(), 60u);
    // The chunked pass is absorbed or expanded MLA over the cache; logits come as float.
    for (size_t i = 0; i < 100; ++i) EXPECT_NEAR(chunks[i], whole[i], 2e-6) << name << i;
    for (size_t i = 0; i < 60; ++i) EXPECT_NEAR(tail[i], whole[i + 40], 2e-6) << name << i;
  }
}

TEST(YarnLosses, DynamicBinsAreWholePassesOfTheirLength) {
  const auto w = model::random_weights(tiny(), 5, spec::DType::f32);
  const auto ids = some_ids(101);
  const auto v = context_variant("dynamic-ntk", 32, 1);
  const auto bins = scen::position_bins(32, 100);
  ASSERT_EQ(bins.size(), 3u);
  EXPECT_EQ(bins[2].begin, 64);
  EXPECT_EQ(bins[2].end, 100);
  scen::VariantRunner runner("reference_f64", w, v, 128, 0);
  const auto sums = runner.by_bin(ids, bins, 16);
  for (size_t b = 0; b < bins.size(); ++b) {
    // The reference re-rotates its keys at every length itself.
    model::BackendOptions o;
    o.max_context = 128;
    const auto backend = scen::make_backend("reference_f64", scen::with_scaling(w, v.scaling), o);
    const auto sequence = backend->new_sequence();
    model::ForwardOptions all;
    all.logits = model::LogitsOf::all;
    const std::span<const int32_t> prefix(ids.data(), static_cast<size_t>(bins[b].end));
    const auto r = backend->forward(*sequence, prefix, all);
    double nll = 0;
    for (int64_t p = bins[b].begin; p < bins[b].end; ++p)
      nll += scen::token_loss(r.logits.data() + p * kV, kV, ids[static_cast<size_t>(p + 1)]);
    EXPECT_NEAR(sums.nll[b], nll, 1e-4) << b;
    EXPECT_EQ(sums.tokens[b], bins[b].end - bins[b].begin);
  }
}

class YarnRun : public ::testing::Test {
 protected:
  void SetUp() override {
    dir_ = (fs::temp_directory_path() /
            ("v3b_test_yarn_" +
             std::string(::testing::UnitTest::GetInstance()->current_test_info()->name())))
               .string();
    fs::remove_all(dir_);
    fs::create_directories(dir_);
    std::ofstream text(dir_ + "/text.txt");
    for (int i = 0; i < 400; ++i) text << "Line " << i * 37 % 101 << " of a text that repeats.\n";
    o_.out = dir_ + "/out";
    o_.model = "random:train";
    o_.text = dir_ + "/text.txt";
    o_.backend = "cpu_f32";
    o_.length = 1300;  // the preset's context is 512
    o_.variants = {"none", "pi", "dynamic-ntk", "yarn"};
    o_.factors = {1, 4};
    o_.windows = {512, 1300};
    o_.window_variants = {"none"};
    o_.print_table = false;
  }
  rep::CsvTable run() {
    EXPECT_EQ(scen::run_yarn_perplexity(o_), 0);
    return rep::read_csv(o_.out + "/yarn_perplexity.csv");
  }
  static double at(const rep::CsvTable& t, const std::string& variant, const std::string& factor,
                   int64_t begin, int64_t end, const std::string& column = "nll_sum") {
    for (size_t i = 0; i < t.rows.size(); ++i)
      if (t.cell(i, "kind") == "bin" && t.cell(i, "variant") == variant &&
          t.cell(i, "factor") == factor && t.number(i, "bin_begin") == begin &&
          t.number(i, "bin_end") == end) {
        const auto v = t.number(i, column);
        EXPECT_TRUE(v) << column;
        return v.value_or(std::nan(""));
      }
    ADD_FAILURE() << "no row " << variant << ' ' << factor << ' ' << begin << ' ' << end;
    return std::nan("");
  }
  std::string dir_;
  scen::YarnOptions o_;
};

TEST_F(YarnRun, FiguresBelongTogether) {
  const auto t = run();
  // Bins add up to the whole and to the part past the trained context.
  for (const auto& [v, f] : {std::pair{"none", ""}, {"yarn", "4"}, {"dynamic-ntk", ""}}) {
    const double a = at(t, v, f, 0, 512), b = at(t, v, f, 512, 1024), c = at(t, v, f, 1024, 1300);
    EXPECT_NEAR(at(t, v, f, 0, 1300), a + b + c, 1e-9);
    EXPECT_NEAR(at(t, v, f, 512, 1300), b + c, 1e-9);
    EXPECT_NEAR(at(t, v, f, 0, 1300, "ppl"), std::exp((a + b + c) / 1300), 1e-9);
  }
  // Factor 1 and the dynamic form inside L are no change at all.
  for (const char* v : {"pi", "yarn"})
    EXPECT_EQ(at(t, v, "1", 0, 1300), at(t, "none", "", 0, 1300)) << v;
  // (Passes of another length: sums in another order. A loss of 6 nats in f32 is off by a few ulps,
  // 2e-6; 512 of them by 5e-5, 1300 by 7e-5. The backend is cpu_f32.)
  EXPECT_NEAR(at(t, "dynamic-ntk", "", 0, 512), at(t, "none", "", 0, 512), 1e-4);
  EXPECT_GT(std::abs(at(t, "dynamic-ntk", "", 512, 1024) - at(t, "none", "", 512, 1024)), 0.1);
  EXPECT_GT(std::abs(at(t, "pi", "4", 0, 512) - at(t, "none", "", 0, 512)), 0.1);
  // Paired differences are differences of the means; YaRN of the same factor is the base.
  const double pi = at(t, "pi", "4", 0, 1300, "mean_nll"),
               yarn = at(t, "yarn", "4", 0, 1300, "mean_nll"),
               none = at(t, "none", "", 0, 1300, "mean_nll");
  EXPECT_NEAR(at(t, "pi", "4", 0, 1300, "vs_yarn_nll"), pi - yarn, 1e-12);
  EXPECT_NEAR(at(t, "pi", "4", 0, 1300, "vs_none_nll"), pi - none, 1e-12);
  EXPECT_EQ(at(t, "none", "", 0, 1300, "vs_yarn_factor"), 4);  // the one that covers 1300 of 512
}

TEST_F(YarnRun, OneWindowIsTheDocument) {
  const auto t = run();
  int64_t seen = 0;
  for (size_t i = 0; i < t.rows.size(); ++i) {
    if (t.cell(i, "kind") != "window") continue;
    ++seen;
    EXPECT_EQ(*t.number(i, "scored_tokens"), 1300);
    if (t.cell(i, "window") == "512") {  // windows of 511 tokens and bos, stride 256
      EXPECT_EQ(*t.number(i, "windows"), 5);
      EXPECT_NE(*t.number(i, "token_mean_ppl"), *t.number(i, "window_mean_ppl"));
    }
  }
  EXPECT_EQ(seen, 2);
  // A window as long as the document (bos included) gives the losses of one pass.
  o_.out = dir_ + "/one";
  o_.windows = {1301};
  o_.window_length = 1300;
  o_.length = 1301;
  const auto one = run();
  double window = 0;
  for (size_t i = 0; i < one.rows.size(); ++i)
    if (one.cell(i, "kind") == "window") {
      window = *one.number(i, "nll_sum");
      EXPECT_EQ(*one.number(i, "token_mean_ppl"), *one.number(i, "window_mean_ppl"));
      EXPECT_EQ(one.cell(i, "windows"), "1");
    }
  EXPECT_NEAR(window, at(t, "none", "", 0, 1300), 1e-4);  // as above
}

TEST_F(YarnRun, ResumeGoesOnFromDocuments) {
  const auto full = run();
  const std::string path = o_.out + "/yarn_perplexity.csv";
  // The run was cut off in the middle: half of the rows and a torn line.
  std::ifstream in(path);
  std::vector<std::string> lines;
  for (std::string l; std::getline(in, l);) lines.push_back(l);
  in.close();
  std::ofstream out(path, std::ios::trunc);
  for (size_t i = 0; i <= 8; ++i) out << lines[i] << '\n';
  out << lines[9].substr(0, lines[9].size() / 2);
  out.close();
  o_.resume = true;
  const auto again = run();
  ASSERT_EQ(again.rows.size(), full.rows.size());
  for (size_t i = 0; i < 8; ++i) EXPECT_EQ(again.rows[i], full.rows[i]);
  for (const auto& [v, f] : {std::pair{"none", ""}, {"pi", "1"}, {"yarn", "4"}})
    EXPECT_EQ(at(again, v, f, 0, 1300), at(full, v, f, 0, 1300));
  // Other weights are other rows.
  o_.seed = 2;
  const auto other = run();
  EXPECT_EQ(other.rows.size(), 2 * full.rows.size());
}

TEST_F(YarnRun, TableFromTheFileAlone) {
  (void)run();
  const std::string table = rep::render_table(o_.out + "/yarn_perplexity.csv");
  EXPECT_NE(table.find("dynamic-ntk"), std::string::npos);
  EXPECT_NE(table.find("512..1K"), std::string::npos);
  EXPECT_NE(table.find("past 512"), std::string::npos);
  EXPECT_NE(table.find("mean over windows"), std::string::npos);
}

TEST(YarnTable, FineTunedRows) {
  const std::string dir = (fs::temp_directory_path() / "v3b_test_yarn_tuned").string();
  fs::remove_all(dir);
  fs::create_directories(dir);
  // The file's own columns; those that the rows do not name stay blank.
  std::ifstream published(std::string(V3B_SOURCE_DIR) +
                          "/reports/published/zen4-2c/yarn_perplexity.csv");
  std::string header;
  std::getline(published, header);
  std::vector<std::string> columns;
  for (std::stringstream in(header); std::getline(in, columns.emplace_back(), ',');) {
  }
  columns.pop_back();
  std::ofstream out(dir + "/yarn_perplexity.csv");
  out << header << "\n";
  const auto row = [&](std::map<std::string, std::string> v) {
    v.insert({{"schema_version", "1"}, {"model", "m"}, {"finetune_steps", "3"}});
    v.insert({{"finetune_contexts", "1024 2048"}, {"variant", "yarn"}, {"factor", "4"}});
    v.insert({{"trained_context", "512"}, {"status", "ok"}});
    size_t used = 0;
    for (size_t i = 0; i < columns.size(); ++i) {
      used += v.count(columns[i]);
      out << (i > 0 ? "," : "") << v[columns[i]];
    }
    EXPECT_EQ(used, 8 + (v.at("kind") == "bin" ? 7 : 3)) << "a column that the file does not have";
    out << "\n";
  };
  row({{"kind", "document"}, {"bin_begin", "0"}, {"bin_end", "512"}});
  row({{"kind", "bin"},
       {"bin_begin", "0"},
       {"bin_end", "512"},
       {"ppl", "51.5"},
       {"vs_untuned_nll", "-0.1"},
       {"vs_untuned_low", "-0.2"},
       {"vs_untuned_high", "-0.05"}});
  row({{"kind", "bin"},
       {"bin_begin", "512"},
       {"bin_end", "2048"},
       {"ppl", "84.9"},
       {"vs_untuned_nll", "-0.1"},
       {"vs_untuned_low", "-0.2"},
       {"vs_untuned_high", "0.05"}});
  out.close();
  const std::string table = rep::render_table(dir + "/yarn_perplexity.csv");
  EXPECT_NE(table.find("3 steps a phase at 1024, then 2048 tokens"), std::string::npos);
  EXPECT_NE(table.find("-0.100 [-0.200, +0.050]"), std::string::npos);
}

TEST_F(YarnRun, BadInput) {
  const auto code = [&](auto change) {
    scen::YarnOptions o = o_;
    change(o);
    try {
      scen::run_yarn_perplexity(o);
    } catch (const Error& e) {
      EXPECT_EQ(std::string(e.what()).find('\n'), std::string::npos);
      return e.code();
    }
    return ExitCode::ok;
  };
  EXPECT_EQ(code([](auto& o) { o.variants = {"rope"}; }), ExitCode::usage);
  EXPECT_EQ(code([](auto& o) { o.factors = {0}; }), ExitCode::usage);
  EXPECT_EQ(code([](auto& o) { o.length = -1; }), ExitCode::usage);
  EXPECT_EQ(code([](auto& o) { o.chunk = 0; }), ExitCode::usage);
  EXPECT_EQ(code([](auto& o) { o.windows = {1}; }), ExitCode::usage);
  EXPECT_EQ(code([](auto& o) { o.window_length = 1301; }), ExitCode::usage);
  EXPECT_EQ(code([](auto& o) { o.length = 100000; }), ExitCode::nothing_ran);
  EXPECT_EQ(code([](auto& o) { o.model = "/nowhere"; }), ExitCode::not_found);
  EXPECT_EQ(code([](auto& o) { o.backend = "gpu"; }), ExitCode::usage);
  EXPECT_EQ(code([](auto& o) { o.finetune = 1; }), ExitCode::usage);  // random weights
  EXPECT_EQ(code([](auto& o) { o.out = "/proc/v3b"; }), ExitCode::cannot_write);
}

TEST_F(YarnRun, EveryColumnIsDescribed) {
  const auto t = run();
  expect_columns_described("yarn_perplexity.csv", t.header);
}

}  // namespace
}  // namespace v3b
