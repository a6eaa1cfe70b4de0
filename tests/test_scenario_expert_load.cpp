// The expert-load scenario: counting, the noise floor, a random model on text against a plain
// count, training rows, measured routes, resuming, bad input.
#include <gtest/gtest.h>

#include <cmath>
#include <filesystem>
#include <fstream>
#include <functional>
#include <sstream>

#include "model/error.h"
#include "model/rng.h"
#include "reports/csv.h"
#include "reports/table.h"
#include "scenarios/backend_factory.h"
#include "scenarios/expert_load.h"
#include "tests/described_columns.h"

namespace v3b {
namespace {

namespace fs = std::filesystem;

std::string fresh_dir(const std::string& name) {
  const fs::path p = fs::temp_directory_path() / ("v3b_test_load_" + name);
  fs::remove_all(p);
  fs::create_directories(p);
  return p.string();
}

void write_file(const std::string& path, const std::string& text) {
  std::ofstream(path, std::ios::binary) << text;
}

// Words drawn by a counter-based generator: no two documents alike.
std::string some_text(uint64_t seed, int64_t words) {
  static const char* vocabulary[] = {"the",  "cache",  "of",  "a",     "model",   "holds", "keys",
                                     "and",  "values", "for", "every", "token",   "that",  "was",
                                     "read", "before", "it",  "so",    "experts", "differ"};
  std::string s;
  for (int64_t i = 0; i < words; ++i) {
    s += vocabulary[model::rng_below({seed, 7}, static_cast<uint64_t>(i), 20)];
    s += i % 11 == 10 ? ".\n" : " ";
  }
  return s + "\n";
}

// A corpus folder as scripts/build_corpus.py writes it.
std::string make_corpus(const std::string& dir) {
  for (const char* split : {"train", "validation", "heldout"}) {
    std::string text, index = "doc_id\tdomain\tpackage\toffset_bytes\tlength_bytes\n";
    for (uint64_t d = 0; d < 4; ++d) {
      const std::string doc = some_text(d + 100 * static_cast<uint64_t>(split[0]), 400);
      index += std::string(split) + "/" + std::to_string(d) + "\tprose\ttest\t" +
               std::to_string(text.size()) + "\t" + std::to_string(doc.size()) + "\n";
      text += doc;
    }
    write_file(dir + "/" + split + ".txt", text);
    write_file(dir + "/" + split + ".index.tsv", index);
  }
  return dir;
}

scen::ExpertLoadOptions model_options(const std::string& dir) {
  scen::ExpertLoadOptions o;
  o.out = dir;
  o.model = "random:train";  // 256 byte tokens, 16 experts in 4 groups of which 2 are kept
  o.backend = "cpu_f32";
  o.text = dir + "/text.txt";
  write_file(o.text, some_text(3, 300));
  o.parts = {"model"};
  o.tokens = 256;
  o.window = 64;
  o.batch_windows = 2;
  o.print_table = false;
  return o;
}

size_t find_row(const rep::CsvTable& t,
                const std::vector<std::pair<std::string, std::string>>& cells) {
  for (size_t i = 0; i < t.rows.size(); ++i) {
    bool all = true;
    for (const auto& [column, value] : cells) all = all && t.cell(i, column) == value;
    if (all) return i;
  }
  ADD_FAILURE() << "no row " << cells[0].second << " " << cells.back().second;
  return 0;
}

TEST(ExpertLoad, Counter) {
  scen::LoadCounter c(4, 2);                        // experts 0,1 | 2,3
  const std::vector<int32_t> first = {0, 1, 0, 2};  // two tokens
  c.add(first, 2);
  c.end_batch();  // load 2,1,1,0: mean 1
  const std::vector<int32_t> second = {3, 2, 3, 2};
  c.add(second, 2);
  c.end_batch();  // load 0,0,2,2
  EXPECT_EQ(c.tokens(), 4);
  EXPECT_EQ(c.batches(), 2);
  EXPECT_EQ(c.load(), (std::vector<int64_t>{2, 1, 3, 2}));
  EXPECT_DOUBLE_EQ(c.maxvio_batch(), 1.0);
  EXPECT_DOUBLE_EQ(c.maxvio_batch_max(), 1.0);
  EXPECT_DOUBLE_EQ(c.groups_per_token(), (1 + 2 + 1 + 1) / 4.0);
  const std::vector<int32_t> bad = {4, 0};
  EXPECT_THROW(c.add(bad, 2), Error);
  EXPECT_THROW(c.add(first, 3), Error);
}

TEST(ExpertLoad, NoiseFloor) {
  // SPEC 1.19: about 2.8 sqrt(E / (K T)) for 256 experts; 0.25 at 4096 tokens, 0.06 at 65536.
  EXPECT_NEAR(scen::maxvio_noise_floor(256, 8, 4096), 0.25, 0.02);
  EXPECT_NEAR(scen::maxvio_noise_floor(256, 8, 65536), 0.06, 0.006);
  EXPECT_EQ(scen::maxvio_noise_floor(16, 16, 100), 0);  // every token takes every expert
  EXPECT_EQ(scen::maxvio_noise_floor(16, 1, 1), 15);    // one token, one expert
  EXPECT_EQ(scen::maxvio_noise_floor(16, 4, 512, 3), scen::maxvio_noise_floor(16, 4, 512, 3));
  EXPECT_THROW(scen::maxvio_noise_floor(4, 5, 10), Error);
}

TEST(ExpertLoad, ModelOnText) {
  const auto o = model_options(fresh_dir("model"));
  ASSERT_EQ(scen::run_expert_load(o), 0);
  const auto t = rep::read_csv(o.out + "/expert_load.csv");
  ASSERT_EQ(t.rows.size(), 4u * 5u);  // layers 1..3, MTP, all

  // The same windows once more, counted plainly.
  const auto m = scen::load_model(o);
  const auto set = scen::load_tokens(o, m);
  ASSERT_EQ(set.docs.size(), 1u);
  const auto backend = scen::make_backend(o.backend, m.weights);
  const int64_t all_windows = static_cast<int64_t>(set.docs[0].ids.size()) / 64;
  double nats = 0;
  std::vector<int64_t> load(16);
  int64_t bytes = 0;
  for (int64_t w = 0; w < 4; ++w) {
    const auto ids = std::span<const int32_t>(set.docs[0].ids)
                         .subspan(static_cast<size_t>(w * all_windows / 4) * 64, 64);
    const auto seq = backend->new_sequence();
    const auto r = backend->forward(*seq, ids, {.logits = model::LogitsOf::all, .routes = true});
    for (size_t i = 0; i + 1 < ids.size(); ++i)
      nats += scen::token_loss(r.logits.data() + i * 256, 256, ids[i + 1]);
    for (const int32_t e : r.routes[1].idx) ++load[static_cast<size_t>(e)];
    ASSERT_EQ(r.routes[1].layer, 2);
    bytes += 63;
  }
  const size_t all = find_row(t, {{"layer", "all"}, {"bias", "on"}, {"group_limit", "on"}});
  EXPECT_NEAR(*t.number(all, "cross_entropy"), nats / (4 * 63), 1e-4);
  EXPECT_NEAR(*t.number(all, "bits_per_byte"), nats / std::log(2.0) / static_cast<double>(bytes),
              1e-4);
  EXPECT_EQ(t.cell(all, "cross_entropy_change"), "");
  const size_t two = find_row(t, {{"layer", "2"}, {"bias", "on"}, {"group_limit", "on"}});
  const double most = static_cast<double>(*std::max_element(load.begin(), load.end())),
               mean = 256 * 4 / 16.0;
  EXPECT_NEAR(*t.number(two, "max_over_mean"), most / mean,
              3 / mean);  // near-ties may route otherwise in a batch
  EXPECT_NEAR(*t.number(two, "maxvio_global"), *t.number(two, "max_over_mean") - 1, 1e-12);
  EXPECT_EQ(*t.number(two, "batch_tokens"), 128);
  EXPECT_EQ(*t.number(two, "batches"), 2);
  EXPECT_GE(*t.number(two, "maxvio_batch"), *t.number(two, "maxvio_global"));

  // The limit keeps two of four groups; without it tokens use more. Switching something off changes
  // the loss.
  for (const char* bias : {"on", "off"}) {
    const size_t on = find_row(t, {{"layer", "all"}, {"bias", bias}, {"group_limit", "on"}});
    const size_t off = find_row(t, {{"layer", "all"}, {"bias", bias}, {"group_limit", "off"}});
    EXPECT_LE(*t.number(on, "groups_per_token"), 2.0);
    EXPECT_GT(*t.number(off, "groups_per_token"), 2.0);
    EXPECT_NE(*t.number(off, "cross_entropy_change"), 0);
    EXPECT_NEAR(*t.number(off, "cross_entropy") - *t.number(all, "cross_entropy"),
                *t.number(off, "cross_entropy_change"), 1e-9);
  }
  const std::string table = rep::render_table(o.out + "/expert_load.csv");
  EXPECT_NE(table.find("T = 256 tokens, batches of 128"), std::string::npos);
  EXPECT_NE(table.find("random weights"), std::string::npos);
}

TEST(ExpertLoad, CapacityDropsAndCosts) {
  auto o = model_options(fresh_dir("capacity"));
  o.parts = {"capacity"};
  o.capacity_tokens = 256;
  o.capacity_factors = {1, 16};
  o.drop_policies = {"slot", "prob"};
  ASSERT_EQ(scen::run_expert_load(o), 0);
  const auto t = rep::read_csv(o.out + "/expert_load.csv");
  // bias on and off x (none, two factors x two policies) x (layers 1..3 and their mean)
  ASSERT_EQ(t.rows.size(), 2u * 5u * 4u);
  const auto row = [&](const char* bias, const char* routes, const char* layer) {
    return find_row(t, {{"bias", bias}, {"routes", routes}, {"layer", layer}});
  };
  // The first expert layer's routes do not know of dropping: counted once more, plainly.
  const auto m = scen::load_model(o);
  const auto set = scen::load_tokens(o, m);
  const auto backend = scen::make_backend(o.backend, m.weights);
  const int64_t all_windows = static_cast<int64_t>(set.docs[0].ids.size()) / 64;
  int64_t dropped = 0;
  for (int64_t w = 0; w < 4; ++w) {
    const auto seq = backend->new_sequence();
    const auto r = backend->forward(*seq,
                                    std::span<const int32_t>(set.docs[0].ids)
                                        .subspan(static_cast<size_t>(w * all_windows / 4) * 64, 64),
                                    {.routes = true});
    std::vector<int64_t> load(16);
    for (const int32_t e : r.routes[0].idx) ++load[static_cast<size_t>(e)];
    for (const int64_t n : load) dropped += std::max<int64_t>(0, n - 64 * 4 / 16);
  }
  ASSERT_GT(dropped, 0);
  for (const char* routes : {"capacity-1-slot", "capacity-1-prob"}) {
    const size_t i = row("on", routes, "1"), all = row("on", routes, "all");
    EXPECT_NEAR(*t.number(i, "dropped_pct"), 100.0 * static_cast<double>(dropped) / (256 * 4),
                1e-9);
    EXPECT_EQ(*t.number(i, "capacity_factor"), 1);
    EXPECT_GT(*t.number(all, "dropped_pct"), 0);
    EXPECT_NE(*t.number(all, "cross_entropy_change"), 0);
  }
  EXPECT_EQ(t.cell(row("on", "capacity-1-prob", "1"), "drop_policy"), "prob");
  EXPECT_NE(t.cell(row("on", "capacity-1-slot", "all"), "cross_entropy"),
            t.cell(row("on", "capacity-1-prob", "all"), "cross_entropy"));
  // A capacity that holds everything is no capacity, bit by bit.
  const size_t none = row("on", "no-dropping", "all"), wide = row("on", "capacity-16-slot", "all");
  EXPECT_EQ(t.cell(wide, "cross_entropy"), t.cell(none, "cross_entropy"));
  EXPECT_EQ(*t.number(wide, "dropped_pct"), 0);
  EXPECT_EQ(*t.number(none, "dropped_pct"), 0);
  EXPECT_EQ(t.cell(none, "capacity_factor"), "");
  EXPECT_NE(*t.number(row("off", "no-dropping", "all"), "cross_entropy_change"), 0);
  const std::string table = rep::render_table(o.out + "/expert_load.csv");
  EXPECT_NE(table.find("Token dropping: random:train (random weights)"), std::string::npos)
      << table;

  o.resume = true;
  ASSERT_EQ(scen::run_expert_load(o), 0);
  EXPECT_EQ(rep::read_csv(o.out + "/expert_load.csv").rows, t.rows);
}

TEST(ExpertLoad, FlagsAreUsedAndRecorded) {
  auto o = model_options(fresh_dir("flags"));
  ASSERT_EQ(scen::run_expert_load(o), 0);
  const auto plain = rep::read_csv(o.out + "/expert_load.csv");
  o.flags.norm_rounding = spec::NormRounding::hf;
  o.parts = {"model", "training", "synthetic"};
  o.strategies = {"bias"};
  o.routes = {"uniform"};
  o.route_tokens = 8;
  o.route_seconds = 0.01;
  o.flags.moe_accum = spec::MoeAccum::bf16;
  ASSERT_EQ(scen::run_expert_load(o), 0);
  const auto t = rep::read_csv(o.out + "/expert_load.csv");
  ASSERT_EQ(t.rows.size(), plain.rows.size() + 2);
  for (size_t i = 0; i < t.rows.size(); ++i)
    EXPECT_EQ(scen::param_of(t.cell(i, "params"), "flags"), "norm_rounding=hf,moe_accum=bf16");
  for (size_t i = 0; i < plain.rows.size(); ++i)
    EXPECT_EQ(scen::param_of(plain.cell(i, "params"), "flags"), "default");
  const std::vector<std::pair<std::string, std::string>> base = {
      {"part", "model"}, {"layer", "all"}, {"bias", "on"}, {"group_limit", "on"}};
  EXPECT_NE(t.cell(find_row(t, base), "cross_entropy"),
            plain.cell(find_row(plain, base), "cross_entropy"));
  EXPECT_EQ(t.cell(find_row(t, {{"part", "training"}}), "status"), "unsupported");
  EXPECT_NE(t.cell(find_row(t, {{"part", "synthetic"}}), "repro").find("moe_accum=bf16"),
            std::string::npos);
}

TEST(ExpertLoad, BackendsAgree) {
  auto o = model_options(fresh_dir("agree"));
  o.tokens = 64;
  o.window = 32;
  ASSERT_EQ(scen::run_expert_load(o), 0);
  const auto a = rep::read_csv(o.out + "/expert_load.csv");
  o.backend = "reference_f32";
  ASSERT_EQ(scen::run_expert_load(o), 0);
  const auto b = rep::read_csv(o.out + "/expert_load.csv");
  ASSERT_EQ(a.rows.size(), b.rows.size());
  for (size_t i = 0; i < a.rows.size(); ++i)
    if (a.cell(i, "layer") == "all") {
      EXPECT_NEAR(*a.number(i, "cross_entropy"), *b.number(i, "cross_entropy"), 1e-3) << i;
    }
}

TEST(ExpertLoad, ResumeKeepsRows) {
  auto o = model_options(fresh_dir("resume"));
  ASSERT_EQ(scen::run_expert_load(o), 0);
  const std::string path = o.out + "/expert_load.csv";
  const auto whole = rep::read_csv(path);
  // An interruption: the header, nine rows, and half a line.
  std::ifstream in(path);
  std::string kept, line;
  for (int i = 0; i < 10 && std::getline(in, line); ++i) kept += line + "\n";
  in.close();
  write_file(path, kept + "1,torn");
  o.resume = true;
  ASSERT_EQ(scen::run_expert_load(o), 0);
  const auto again = rep::read_csv(path);
  ASSERT_EQ(again.rows.size(), whole.rows.size());
  for (size_t i = 0; i < 9; ++i) EXPECT_EQ(again.rows[i], whole.rows[i]);
  for (size_t i = 9; i < whole.rows.size(); ++i)
    for (const char* c :
         {"layer", "bias", "group_limit", "maxvio_batch", "cross_entropy", "cross_entropy_change"})
      EXPECT_EQ(again.cell(i, c), whole.cell(i, c)) << i << " " << c;
}

TEST(ExpertLoad, TrainingRows) {
  scen::ExpertLoadOptions o;
  o.out = fresh_dir("training");
  o.corpus = make_corpus(fresh_dir("corpus"));
  o.parts = {"training"};
  o.strategies = {"none", "bias", "switch"};
  o.train_steps = 4;
  o.train_batch = 2;
  o.train_context = 32;
  o.print_table = false;
  ASSERT_EQ(scen::run_expert_load(o), 0);
  const auto t = rep::read_csv(o.out + "/expert_load.csv");
  ASSERT_EQ(t.rows.size(), 12u);
  const size_t none = find_row(t, {{"strategy", "none"}, {"step", "1"}});
  for (const char* s :
       {"bias", "switch"}) {  // the same seed: the first step sees the same model and text
    const size_t i = find_row(t, {{"strategy", s}, {"step", "1"}});
    EXPECT_EQ(t.cell(i, "train_loss"), t.cell(none, "train_loss"));
    EXPECT_EQ(t.cell(i, "maxvio_batch"), t.cell(none, "maxvio_batch"));
  }
  EXPECT_NEAR(*t.number(none, "train_loss"), std::log(4096.0), 0.3);
  EXPECT_EQ(*t.number(none, "aux_loss"), 0);
  EXPECT_GT(*t.number(find_row(t, {{"strategy", "switch"}, {"step", "1"}}), "aux_loss"), 0);
  const size_t last = find_row(t, {{"strategy", "bias"}, {"step", "4"}});
  EXPECT_TRUE(t.number(last, "val_loss").has_value());
  EXPECT_EQ(*t.number(last, "tokens"), 4 * 64);
  EXPECT_GT(*t.number(last, "noise_floor_batch"), 0.1);  // T = 64
  EXPECT_NE(rep::render_table(o.out + "/expert_load.csv").find("T = 64 tokens a batch"),
            std::string::npos);

  o.resume = true;  // nothing is left to do, and nothing is lost
  ASSERT_EQ(scen::run_expert_load(o), 0);
  EXPECT_EQ(rep::read_csv(o.out + "/expert_load.csv").rows, t.rows);
}

TEST(ExpertLoad, MeasuredRoutes) {
  scen::ExpertLoadOptions o;
  o.out = fresh_dir("routes");
  o.parts = {"synthetic"};
  o.routes = {"uniform", "hot-4", "ratio-2"};
  o.route_tokens = 8;
  o.route_seconds = 0.01;
  o.print_table = false;
  ASSERT_EQ(scen::run_expert_load(o), 0);
  const auto t = rep::read_csv(o.out + "/expert_load.csv");
  ASSERT_EQ(t.rows.size(), 3u);
  const size_t uniform = find_row(t, {{"routes", "uniform"}}),
               hot = find_row(t, {{"routes", "hot-4"}}),
               ratio = find_row(t, {{"routes", "ratio-2"}});
  EXPECT_EQ(*t.number(hot, "dead_experts"), 12);  // four of sixteen take everything
  EXPECT_EQ(*t.number(hot, "max_over_mean"), 4);
  EXPECT_EQ(*t.number(ratio, "max_over_mean"), 2);
  EXPECT_LT(*t.number(uniform, "max_over_mean"), 4);
  for (const size_t i : {uniform, hot, ratio}) {
    EXPECT_TRUE(t.cell(i, "check") == "passed" || t.cell(i, "check") == "suspect")
        << t.cell(i, "check_reason");
    EXPECT_GT(*t.number(i, "median_us"), 0);
    EXPECT_GE(*t.number(i, "samples"), 1);
  }
  EXPECT_EQ(*t.number(uniform, "time_over_uniform"), 1);
  EXPECT_NEAR(*t.number(hot, "time_over_uniform"),
              *t.number(hot, "median_us") / *t.number(uniform, "median_us"), 1e-9);
  EXPECT_NE(rep::render_table(o.out + "/expert_load.csv").find("12 of 16"), std::string::npos);

  o.resume = true;  // a new row is put in relation to the uniform row of the earlier run
  o.routes = {"uniform", "hot-4", "ratio-2", "zipf-1"};
  ASSERT_EQ(scen::run_expert_load(o), 0);
  const auto more = rep::read_csv(o.out + "/expert_load.csv");
  ASSERT_EQ(more.rows.size(), 4u);
  EXPECT_EQ(more.rows[0], t.rows[0]);
  EXPECT_NEAR(*more.number(3, "time_over_uniform"),
              *more.number(3, "median_us") / *t.number(uniform, "median_us"), 1e-9);
}

TEST(ExpertLoad, BadInput) {
  const auto code = [](const std::function<void(scen::ExpertLoadOptions&)>& change) {
    auto o = model_options(fresh_dir("bad"));
    change(o);
    try {
      scen::run_expert_load(o);
    } catch (const Error& e) {
      EXPECT_EQ(std::string(e.what()).find('\n'), std::string::npos);
      return e.code();
    }
    return ExitCode::ok;
  };
  using O = scen::ExpertLoadOptions;
  EXPECT_EQ(code([](O& o) { o.parts = {"models"}; }), ExitCode::usage);
  EXPECT_EQ(code([](O& o) { o.backend = "gpu"; }), ExitCode::usage);
  EXPECT_EQ(code([](O& o) { o.parts = {"synthetic"}, o.routes = {"hot-"}; }), ExitCode::usage);
  EXPECT_EQ(code([](O& o) { o.parts = {"synthetic"}, o.routes = {"even"}; }), ExitCode::usage);
  EXPECT_EQ(code([](O& o) { o.tokens = -5; }), ExitCode::usage);
  EXPECT_EQ(code([](O& o) { o.capacity_factors = {0}; }), ExitCode::usage);
  EXPECT_EQ(code([](O& o) { o.parts = {"capacity"}, o.drop_policies = {"last"}; }),
            ExitCode::usage);
  EXPECT_EQ(code([](O& o) { o.flags.ignore_group_limit = true; }), ExitCode::usage);
  EXPECT_EQ(code([](O& o) { o.model = "/no/such/folder"; }), ExitCode::not_found);
  EXPECT_EQ(code([](O& o) { o.text = "/no/such/text"; }), ExitCode::not_found);
  EXPECT_EQ(code([](O& o) { o.window = 100000; }), ExitCode::nothing_ran);
  EXPECT_EQ(code([](O& o) { write_file(o.text, "\xff\xfe"); }), ExitCode::bad_input);
  EXPECT_EQ(code([](O& o) { o.parts = {"training"}, o.text = "", o.corpus = "/no/such/corpus"; }),
            ExitCode::not_found);
  EXPECT_EQ(code([](O& o) { o.parts = {"training"}, o.text = "", o.strategies = {"biass"}; }),
            ExitCode::usage);
}

TEST(ExpertLoad, EveryColumnIsDescribed) {
  const auto o = model_options(fresh_dir("columns"));
  ASSERT_EQ(scen::run_expert_load(o), 0);
  expect_columns_described("expert_load.csv", rep::read_csv(o.out + "/expert_load.csv").header);
}

}  // namespace
}  // namespace v3b
