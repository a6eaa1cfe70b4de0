// The training loop: learning, balance, resuming, its log, export, evaluation beside xz, options
// out of range; compatibility flags as text.
#include <gtest/gtest.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <csignal>
#include <filesystem>
#include <fstream>
#include <map>

#include "bench/harness/flags_text.h"
#include "kernels/train/step.h"
#include "model/error.h"
#include "model/rng.h"
#include "reports/csv.h"
#include "scenarios/training.h"
#include "scenarios/training_evaluate.h"
#include "scenarios/training_log.h"

namespace v3b {
namespace {

namespace fs = std::filesystem;
namespace kt = kern::train;
using kt::Arithmetic;

std::vector<int32_t> random_tokens(int64_t n, int64_t V, uint64_t seed) {
  std::vector<int32_t> t(static_cast<size_t>(n));
  for (size_t i = 0; i < t.size(); ++i) t[i] = int32_t(model::rng_below({seed, 4}, i, V));
  return t;
}

class TrainLoop : public testing::Test {
 protected:
  void SetUp() override {
    dir_ = fs::temp_directory_path() / ("v3b_train_" + std::to_string(getpid()));
    fs::remove_all(dir_);
    fs::create_directories(dir_);
    for (const char* split : {"train", "validation"}) {
      std::string text;
      std::ofstream index(dir_ / (std::string(split) + ".index.tsv"));
      index << "doc_id\tdomain\tpackage\toffset_bytes\tlength_bytes\n";
      for (int d = 0; d < 20; ++d) {
        std::string doc;
        for (int i = 0; i < 40; ++i)
          doc += "The same line stands here, number after number: 0 1 2 3 4.\n";
        index << "doc" << d << "\tprose\tnone\t" << text.size() << "\t" << doc.size() << "\n";
        text += doc;
      }
      std::ofstream(dir_ / (std::string(split) + ".txt")) << text;
    }
    model::ModelConfig c = model::load_preset("micro");
    c.vocab_size = 4096, c.max_position_embeddings = 64;
    std::ofstream(dir_ / "config.json") << model::config_to_json(c);
    o_.model = (dir_ / "config.json").string();
    o_.corpus_dir = dir_.string();
    o_.batch = 4, o_.lr = 1e-2, o_.warmup_steps = 5, o_.steps = 60, o_.quiet = true;
    o_.validate_every = 1000;
  }
  void TearDown() override { fs::remove_all(dir_); }
  std::string read(const fs::path& p) const {
    std::ifstream in(p, std::ios::binary);
    return {std::istreambuf_iterator<char>(in), {}};
  }
  fs::path dir_;
  scen::TrainOptions o_;
};

TEST_F(TrainLoop, LearnsARepeatedPattern) {
  const scen::TrainResult r = scen::train(o_);
  const auto tok = model::Tokenizer::load(model::model_dir() + "/tiny-v3/tokenizer.model");
  const auto text = model::tokenize_corpus(model::Corpus::load(o_.corpus_dir, "train"), tok);
  std::map<int32_t, double> count;
  for (int32_t id : text.ids) ++count[id];
  double entropy = 0;
  for (const auto& [id, n] : count) {
    const double q = n / double(text.ids.size());
    entropy -= q * std::log(q);
  }
  EXPECT_LT(r.rows.back().loss, 0.5 * entropy);
  EXPECT_LT(r.validation.loss(), 0.5 * entropy);
  EXPECT_GT(r.rows[2].mtp_loss, 0);
}

TEST_F(TrainLoop, BiasBalances) {
  double tail[2] = {};
  for (int i = 0; i < 2; ++i) {
    o_.balance = i == 0 ? scen::Balance::none : scen::Balance::bias;
    const auto r = scen::train(o_);
    for (size_t k = r.rows.size() / 2; k < r.rows.size(); ++k)
      tail[i] += r.rows[k].maxvio_batch_mean;
  }
  EXPECT_LT(tail[1], tail[0]);
}

TEST_F(TrainLoop, EveryStrategyRuns) {
  o_.steps = 12;
  for (const char* name : {"none", "switch", "sequence", "bias", "bias+sequence"}) {
    o_.balance = scen::parse_balance(name);
    const auto r = scen::train(o_);
    EXPECT_TRUE(std::isfinite(r.rows.back().loss)) << name;
    EXPECT_EQ(r.rows.back().aux_loss > 0,
              std::string(name) != "none" && std::string(name) != "bias");
  }
  EXPECT_THROW(scen::parse_balance("sequence+bias"), Error);
}

// SIGTERM in the middle, then --resume: the same weights, bit by bit, as without interruption.
TEST_F(TrainLoop, InterruptedAndResumedIsTheSameRun) {
  o_.steps = 24, o_.log_every = 4;
  o_.out_dir = (dir_ / "whole").string();
  scen::train(o_);
  o_.out_dir = (dir_ / "parts").string();
  o_.on_row = [](const scen::TrainRow& r) {
    if (r.step == 12) std::raise(SIGTERM);
  };
  const auto cut = scen::train(o_);
  EXPECT_TRUE(cut.interrupted);
  EXPECT_EQ(cut.signal, SIGTERM);
  o_.on_row = nullptr;
  o_.resume = true;
  EXPECT_FALSE(scen::train(o_).interrupted);
  const char* file = "export-latest/model.safetensors";
  EXPECT_EQ(read(dir_ / "whole" / file), read(dir_ / "parts" / file));
  // Every row once, in order, to the end, and those before the interruption kept.
  const rep::CsvTable csv = rep::read_csv((dir_ / "parts" / "train.csv").string());
  std::vector<int64_t> steps;
  for (size_t i = 0; i < csv.rows.size(); ++i) {
    steps.push_back(int64_t(csv.number(i, "step").value()));
    EXPECT_FALSE(csv.cell(i, "run_id").empty());
    EXPECT_GT(csv.number(i, "loss").value(), 0);
    EXPECT_EQ(csv.cell(i, "val_loss"), "");  // validate_every is beyond the run's end
  }
  EXPECT_TRUE(std::is_sorted(steps.begin(), steps.end(), std::less_equal<>()));
  ASSERT_GE(steps.size(), 6u);
  EXPECT_EQ(steps[0], 4);
  EXPECT_EQ(steps[2], 12);
  EXPECT_EQ(steps.back(), 24);
  o_.seed = 2;  // another run's state
  EXPECT_THROW(scen::train(o_), Error);
  o_.out_dir = (dir_ / "nothing").string();
  EXPECT_THROW(scen::train(o_), Error);
}

// The exported folder loads, and trained further from there starts where the run ended.
TEST_F(TrainLoop, ExportLoadsAndFineTunes) {
  o_.steps = 30;
  o_.out_dir = (dir_ / "run").string();
  const auto first = scen::train(o_);
  const auto w = model::load_weights(o_.out_dir + "/export-latest");
  auto step = kt::make_train_step(w->config, Arithmetic::bf16);
  scen::set_weights(*step, *w);
  EXPECT_EQ(step->bias(), first.step->bias());
  const auto tokens = random_tokens(2 * 65, 4096, 9);
  const double a = first.step->run({2, 64, tokens.data(), nullptr}, {}, false).nats;
  const double b = step->run({2, 64, tokens.data(), nullptr}, {}, false).nats;
  EXPECT_NEAR(a, b, 5e-3 * a);  // the router's float32 weights were rounded to bf16
  scen::TrainOptions f = o_;
  f.init_dir = o_.out_dir + "/export-latest", f.out_dir = "", f.steps = 4, f.log_every = 1;
  f.context = 128, f.lr = 1e-4;
  f.rope_scaling = model::RopeScaling{};
  f.rope_scaling->type = model::RopeType::yarn, f.rope_scaling->factor = 2;
  f.rope_scaling->original_max_position_embeddings = 64;
  const auto second = scen::train(f);
  EXPECT_EQ(second.config.max_position_embeddings, 128);
  EXPECT_LT(second.rows.front().loss, first.rows.front().loss);
}

// 0 is never: no row has a validation, and nothing is divided by it.
TEST_F(TrainLoop, ValidateEvery) {
  o_.steps = 6, o_.log_every = 1;
  for (const int64_t every : {0, 2}) {
    o_.validate_every = every;
    int measured = 0;
    for (const auto& r : scen::train(o_).rows) measured += r.val_loss >= 0;
    EXPECT_EQ(measured, every == 0 ? 0 : 2);  // the last step's is the result's own
  }
}

// Rows of the format before identity columns are kept, later ones and a torn one are not.
TEST_F(TrainLoop, LogTakesOverOldRowsAndWritesNoNan) {
  const std::string path = (dir_ / "train.csv").string();
  std::ofstream(path)
      << "step,tokens,loss,val_loss\n10,100,8.5,\n20,200,7.5,7.25\n30,300,6.5,\n40,40";
  scen::TrainRow row;
  row.step = 21, row.loss = std::nan(""), row.grad_norm = HUGE_VAL, row.val_loss = std::nan("");
  scen::TrainLog(path, true, 20).add(row);
  const rep::CsvTable t = rep::read_csv(path);
  ASSERT_EQ(t.rows.size(), 3u);
  EXPECT_EQ(t.cell(1, "step"), "20");
  EXPECT_EQ(t.cell(1, "val_loss"), "7.25");
  EXPECT_EQ(t.cell(1, "run_id"), "");
  EXPECT_EQ(t.cell(2, "step"), "21");
  EXPECT_FALSE(t.cell(2, "run_id").empty());
  for (const char* c : {"loss", "grad_norm", "val_loss"}) EXPECT_EQ(t.cell(2, c), "") << c;
  EXPECT_EQ(read(path).find("nan"), std::string::npos);
}

TEST_F(TrainLoop, EvaluatesAWholeSplitBesideXz) {
  o_.steps = 20, o_.out_dir = (dir_ / "run").string();
  const auto trained = scen::train(o_);
  scen::EvaluateOptions e;
  e.split = "validation", e.init_dir = o_.out_dir + "/export-latest", e.corpus_dir = o_.corpus_dir;
  e.out = (dir_ / "evaluate.csv").string(), e.quiet = true;
  const auto r = scen::evaluate_split(e);
  const std::string text = read(dir_ / "validation.txt");
  EXPECT_EQ(r.documents, 20);
  EXPECT_EQ(r.model.bytes, int64_t(text.size()));
  EXPECT_EQ(r.model.tokens, trained.validation.tokens);
  EXPECT_NEAR(r.model.nats, trained.validation.nats, 1e-2 * r.model.nats);  // weights in bf16
  EXPECT_EQ(r.xz_bytes, scen::xz_size(text));
  EXPECT_GT(r.xz_bytes, 60);                         // one line's text at least
  EXPECT_LT(r.xz_bytes, int64_t(text.size()) / 20);  // it repeats
  const rep::CsvTable t = rep::read_csv(e.out);
  ASSERT_EQ(t.rows.size(), 1u);
  EXPECT_EQ(t.number(0, "bits_per_byte").value(), r.model.bits_per_byte());
  EXPECT_EQ(t.number(0, "xz_bits_per_byte").value(), r.xz_bits_per_byte());
  e.split = "train";
  EXPECT_THROW(scen::evaluate_split(e), Error);
  try {
    scen::xz_size(text, "no-such-xz");
    FAIL();
  } catch (const Error& error) {
    EXPECT_EQ(error.code(), ExitCode::not_found);
    EXPECT_NE(std::string(error.what()).find("no-such-xz"), std::string::npos);
  }
  EXPECT_THROW(scen::xz_size(text, "false"), Error);
}

TEST_F(TrainLoop, OptionsOutOfRangeNameTheFlag) {
  const double nan = std::nan(""), inf = HUGE_VAL;
  const std::map<std::string, double scen::TrainOptions::*> flags = {
      {"--mtp-lambda", &scen::TrainOptions::mtp_lambda},
      {"--mtp-lambda-late", &scen::TrainOptions::mtp_lambda_late},
      {"--weight-decay", &scen::TrainOptions::weight_decay},
      {"--clip", &scen::TrainOptions::clip},
      {"--lr", &scen::TrainOptions::lr},
      {"--min-lr-ratio", &scen::TrainOptions::min_lr_ratio},
      {"--aux-alpha", &scen::TrainOptions::aux_alpha},
      {"--bias-speed", &scen::TrainOptions::bias_speed},
      {"--minutes", &scen::TrainOptions::minutes}};
  scen::check_train_options(o_);
  for (const auto& [flag, member] : flags) {
    for (const double v : {nan, inf, -inf, -2.0}) {
      scen::TrainOptions o = o_;
      o.*member = v;
      try {
        scen::check_train_options(o);
        ADD_FAILURE() << flag << " " << v;
      } catch (const Error& e) {
        EXPECT_EQ(e.code(), ExitCode::usage);
        EXPECT_EQ(std::string(e.what()).find(flag + ": bad value; expected "), 0u) << e.what();
      }
    }
  }
  o_.min_lr_ratio = 1.5;
  EXPECT_THROW(scen::check_train_options(o_), Error);
  o_.min_lr_ratio = 0, o_.log_every = 0;
  EXPECT_THROW(scen::check_train_options(o_), Error);
}

TEST(FlagsText, ReadsWritesAndRejects) {
  const std::string text =
      "rope_layout=hf_halfsplit,yarn_ramp=paper,router_mask=zero,gate_eps=0,mtp_zero_pos0=1";
  const spec::Flags f = bench::parse_forward_flags(text);
  EXPECT_EQ(f.router_mask, spec::RouterMask::zero);
  EXPECT_EQ(f.yarn_ramp, spec::YarnRamp::paper);
  EXPECT_EQ(f.norm_rounding, spec::NormRounding::single);
  EXPECT_EQ(bench::changed_flags_text(f), text);
  EXPECT_EQ(bench::changed_flags_text(bench::parse_forward_flags("ppl=token_mean")), "");
  const auto message = [](const char* bad) -> std::string {
    try {
      bench::parse_forward_flags(bad);
    } catch (const Error& e) {
      EXPECT_EQ(e.code(), ExitCode::usage);
      return e.what();
    }
    return "";
  };
  EXPECT_NE(message("router=zero").find("rope_layout yarn_when"), std::string::npos);
  EXPECT_NE(message("router_mask=one").find("neg_inf zero"), std::string::npos);
  EXPECT_NE(message("router_mask").find("router_mask"), std::string::npos);
  EXPECT_NE(message("drop_policy=prob").find("no forward pass reads"), std::string::npos);
}

TEST_F(TrainLoop, BadOptions) {
  o_.minutes = 1;  // and steps
  EXPECT_THROW(scen::train(o_), Error);
  o_.minutes = 0, o_.corpus_dir = "/nowhere";
  EXPECT_THROW(scen::train(o_), Error);
}

}  // namespace
}  // namespace v3b
