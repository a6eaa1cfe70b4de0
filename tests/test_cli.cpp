// The built binary from outside: exit codes, one line on stderr for bad input, files that survive
// interruption (DESIGN 4 and 5).
#include <gtest/gtest.h>
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include <chrono>
#include <filesystem>
#include <fstream>
#include <set>
#include <sstream>
#include <thread>

#include "bench/harness/shape_io.h"
#include "bench/ops/forward_weights.h"
#include "model/weights.h"
#include "reports/csv.h"
#include "reports/row.h"

namespace v3b {
namespace {

const std::string kBinary = std::string(V3B_BINARY_DIR) + "/v3bench";

std::string slurp(const std::string& path) {
  std::ifstream in(path, std::ios::binary);
  std::ostringstream s;
  s << in.rdbuf();
  return s.str();
}

struct Result {
  int code = -1;
  std::string out, err;
};

class Cli : public ::testing::Test {
 protected:
  std::string dir_ =
      std::filesystem::temp_directory_path() / ("v3b_cli_" + std::to_string(getpid()));
  void SetUp() override {
    ASSERT_TRUE(std::filesystem::exists(kBinary)) << "build the target v3bench first";
    std::filesystem::create_directories(dir_);
  }
  void TearDown() override { std::filesystem::remove_all(dir_); }

  Result run(const std::string& args, const std::string& before = "") {
    const std::string command = "cd " + dir_ + "; " + before + " " + kBinary + " " + args + " >" +
                                dir_ + "/out 2>" + dir_ + "/err";
    const int status = std::system(("bash -c '" + command + "'").c_str());
    return {WIFEXITED(status) ? WEXITSTATUS(status) : 1000 + WTERMSIG(status), slurp(dir_ + "/out"),
            slurp(dir_ + "/err")};
  }
  // One line on stderr that holds every part.
  void expect_one_line(const std::string& args, int code,
                       std::initializer_list<const char*> parts) {
    const Result r = run(args);
    EXPECT_EQ(r.code, code) << args << "\n" << r.err;
    EXPECT_EQ(std::count(r.err.begin(), r.err.end(), '\n'), 1) << args << "\n" << r.err;
    EXPECT_TRUE(r.out.empty()) << args << "\n" << r.out;
    for (const char* p : parts)
      EXPECT_NE(r.err.find(p), std::string::npos) << "no \"" << p << "\" in: " << r.err;
  }
  rep::CsvTable bench_csv(const std::string& out) {
    return rep::read_csv(dir_ + "/" + out + "/bench.csv");
  }
};

const char* kSmall = "--op rmsnorm --case T=3,d=37,dtype=f32";

TEST_F(Cli, UsageErrorsAreOneLineAnd64) {
  expect_one_line("bench --qick", 64, {"--qick", "did you mean --quick?", "v3bench bench --help"});
  expect_one_line("scenario kv-cache --ful", 64, {"--ful", "did you mean --full?"});
  expect_one_line("train --lrr=3", 64, {"unknown option '--lrr'", "did you mean --lr?"});
  expect_one_line("check --nothing-like-it", 64, {"unknown option '--nothing-like-it'"});
  expect_one_line("chek", 64, {"chek", "did you mean check?"});
  expect_one_line("", 64, {"subcommand"});
  expect_one_line("check --op rmsnrm", 64, {"rmsnrm", "rmsnorm"});
  expect_one_line("check --op rmsnorm --impl cpu_fast", 64, {"cpu_fast", "cpu_simd"});
  expect_one_line("check --op rmsnorm --case T=3,dd=1", 64, {"dd", "one of: T d"});
  expect_one_line("check --op rmsnorm --case T=three", 64, {"three"});
  expect_one_line("check --op rmsnorm --case T=8:1", 64, {"8:1"});
  expect_one_line("check --case T=3", 64, {"--op"});
  expect_one_line("check --filter \"(\"", 64, {"--filter"});
  expect_one_line("check --device tpu", 64, {"tpu"});
  expect_one_line("check --quick --full", 64, {"--quick"});
  expect_one_line("check --threads many", 64, {"many"});
  expect_one_line("compare only_one", 64, {"NEW"});
  expect_one_line("scenario kv-cahce", 64, {"kv-cahce", "did you mean kv-cache?"});
  expect_one_line("bench --op rmsnorm --case T=3 --min-time nan", 64, {"--min-time", "nan"});
  expect_one_line("compare a b --threshold nan", 64, {"--threshold", "nan"});
  expect_one_line("generate --max-new 1", 64, {"--prompt"});
  expect_one_line("scenario kv-cache --contexts 1:x", 64, {"--contexts", "x"});
}

// --flags in every scenario: refused when unknown, in every row's params, never mixed by --resume.
TEST_F(Cli, ScenarioFlags) {
  std::ofstream text(dir_ + "/text.txt");
  for (int i = 0; i < 400; ++i) text << "Line " << i * i % 97 << " of keys, values and experts.\n";
  text.close();
  const std::string common = " --model random:train --text text.txt --out ";
  const std::pair<const char*, std::string> scenarios[] = {
      {"kv-cache", "--presets micro --contexts 64 --run-contexts 64 --no-step"},
      {"expert-load", "--parts model --tokens 256 --window 64 --batch-windows 2"},
      {"yarn-perplexity",
       "--variants none,yarn --factors 2 --length 96 --docs 1 --windows 64 --window-docs 1 "
       "--window-length 96"},
      {"mtp-decoding",
       "--drafts 1 --temperatures 0.7 --prompts 1 --prompt-tokens 16 --max-new 8 --forced 1 "
       "--forced-prompts 1 --text-tokens 64"}};
  for (const auto& [name, options] : scenarios) {
    const std::string scenario = std::string("scenario ") + name + " ";
    expect_one_line(scenario + "--flags router_musk=zero", 64, {"router_musk", "one of:"});
    expect_one_line(scenario + "--flags router_mask=none", 64, {"router_mask", "neg_inf zero"});
    const std::string out = std::string("flags_") + name;
    const std::string all = scenario + options + common + out;
    const Result r = run(all + " --flags router_mask=zero,empty_lse=-inf --seed 3 --threads 1");
    ASSERT_EQ(r.code, 0) << name << "\n" << r.err;
    std::string file = name;
    std::replace(file.begin(), file.end(), '-', '_');
    const auto t = rep::read_csv(dir_ + "/" + out + "/" + file + ".csv");
    ASSERT_GT(t.rows.size(), 0u) << name;
    for (size_t i = 0; i < t.rows.size(); ++i)
      EXPECT_NE(t.cell(i, "params").find("seed=3;threads=1;flags=router_mask=zero,empty_lse=-inf"),
                std::string::npos)
          << name << ": " << t.cell(i, "params");
    expect_one_line(all + " --resume --seed 3", 64, {"other flags", "router_mask=zero"});
    EXPECT_EQ(rep::read_csv(dir_ + "/" + out + "/" + file + ".csv").rows, t.rows);
  }
  expect_one_line("scenario claims --flags router_mask=zero", 64, {"--flags"});
}

TEST_F(Cli, BenchmarkFlagsAreGoogleBenchmarks) {
  expect_one_line(std::string("bench ") + kSmall + " --benchmark_no_such_flag=1", 64,
                  {"--benchmark_no_such_flag"});
  const Result r = run(
      "bench --op rmsnorm --case T=64,d=256 --impl cpu_simd --threads 1 --benchmark_min_time=0.01 "
      "--benchmark_repetitions=2 "
      "--benchmark_out=gb.json --benchmark_out_format=json");
  EXPECT_EQ(r.code, 0) << r.err;
  const std::string json = slurp(dir_ + "/gb.json");
  EXPECT_NE(json.find("rmsnorm.cpu_simd/T=64"), std::string::npos) << json;
  EXPECT_NE(json.find("\"repetitions\": 2"), std::string::npos) << json;
  EXPECT_EQ(json.substr(json.find_last_not_of("\n ")), "}\n");
}

TEST_F(Cli, NothingMatchedIs4) {
  expect_one_line("check --filter nothing_is_called_so", 4, {"no job"});
}

TEST_F(Cli, HelpAndVersionAreNoErrors) {
  for (const char* a : {"--help", "bench --help", "--version", "scenario --help"}) {
    const Result r = run(a);
    EXPECT_EQ(r.code, 0) << a;
    EXPECT_FALSE(r.out.empty()) << a;
  }
}

TEST_F(Cli, CheckAnyShapeWritesRowsAndItsReproRunsAgain) {
  const Result r =
      run("check --op rmsnorm --case T=1:4:*2,d=37,dtype=f32 --impl cpu_simd --out res --seed 7 "
          "--threads 1");
  ASSERT_EQ(r.code, 0) << r.err;
  const auto t = bench_csv("res");
  ASSERT_EQ(t.rows.size(), 3u);
  EXPECT_EQ(t.cell(0, "status"), "passed");
  EXPECT_EQ(t.cell(0, "impl"), "rmsnorm.cpu_simd");
  EXPECT_TRUE(std::filesystem::exists(dir_ + "/res/machine.json"));
  const std::string repro = t.cell(1, "repro");
  ASSERT_EQ(repro.rfind("v3bench ", 0), 0u);
  const Result again = run(repro.substr(8) + " --out again");
  ASSERT_EQ(again.code, 0) << again.err;
  const auto u = bench_csv("again");
  ASSERT_EQ(u.rows.size(), 1u);
  for (const char* c : {"case", "max_abs_err", "err_over_bound", "worst_index", "params"})
    EXPECT_EQ(u.cell(0, c), t.cell(1, c)) << "same seed, other " << c;
}

TEST_F(Cli, BenchThenTableAndCompare) {
  const Result r = run(
      "bench --device cpu --op rmsnorm --case T=64,d=256 --threads 1 --min-time 0.02 --out res");
  ASSERT_EQ(r.code, 0) << r.err;
  const auto t = bench_csv("res");
  ASSERT_GE(t.rows.size(), 2u);
  for (size_t i = 0; i < t.rows.size(); ++i) {
    EXPECT_TRUE(t.number(i, "median_us").has_value()) << t.cell(i, "impl");
    EXPECT_FALSE(t.cell(i, "roof").empty());
  }
  EXPECT_NE(run("table res").out.find("rmsnorm.cpu_simd"), std::string::npos);
  EXPECT_EQ(run("compare res res").code, 0);
  EXPECT_EQ(run("compare res/bench.csv res/bench.csv --all").code, 0);
}

// What scripts/peers stands on: the model of a case as files, and times that are never called passed.
TEST_F(Cli, ExportedModelIsTheOneThatIsTimed) {
  const std::string model =
      "L=2,L_d=1,d=128,n_h=2,d_n=32,d_r=16,d_v=32,d_q=0,d_c=64,f=128,m=64,E=8,N_s=1,K=2,G=1,M=1,V="
      "256";
  Result r = run("export --case " + model + " --out ckpt");
  ASSERT_EQ(r.code, 0) << r.err;
  const auto s = bench::shape_from_text<spec::ForwardShape>(model, "forward_decode");
  const auto made = bench::forward_weights(s, false);
  const auto read = model::load_weights(dir_ + "/ckpt");
  EXPECT_EQ(read->config.num_hidden_layers, 2);
  EXPECT_EQ(read->config.q_lora_rank, 0);
  const auto a = model::named_tensors(*made), b = model::named_tensors(*read);
  ASSERT_EQ(a.size(), b.size());
  for (size_t i = 0; i < a.size(); ++i) {
    EXPECT_EQ(a[i].first, b[i].first);
    EXPECT_EQ(a[i].second.dtype, b[i].second.dtype);
    EXPECT_EQ(model::to_float_vector(a[i].second), model::to_float_vector(b[i].second))
        << a[i].first;
  }
  expect_one_line("export --op rmsnorm --case T=1 --out ckpt", 64, {"--op", "forward_decode"});
  expect_one_line("export --out ckpt --case w_dtype=f8e4m3," + model, 64, {"w_dtype=bf16"});

  r =
      run("bench --op forward_decode --impl cpu_backend --unchecked --min-time 0.01 --rounds 1 "
          "--out res --case s0=16,context=rows," +
          model);
  ASSERT_EQ(r.code, 0) << r.err;
  const auto t = bench_csv("res");
  ASSERT_EQ(t.rows.size(), 1u);
  EXPECT_EQ(t.cell(0, "status"), "unchecked");
  EXPECT_GT(t.number(0, "median_us").value_or(0), 0);
  EXPECT_FALSE(t.number(0, "rel_fro_err").has_value());
  EXPECT_NE(r.out.find("0 passed, 0 failed, 1 timed unchecked"), std::string::npos) << r.out;
  EXPECT_EQ(run("table res --peers").out.find("cpu_backend"), std::string::npos);
}

TEST_F(Cli, MissingAndBadFiles) {
  expect_one_line("table nowhere", 66, {"nowhere"});
  expect_one_line("compare none.csv none.csv", 66, {"none.csv"});
  std::ofstream(dir_ + "/bad.csv") << "op,impl\na,b\n";
  expect_one_line("compare bad.csv bad.csv", 65, {"bad.csv", "missing column"});
  expect_one_line("table bad.csv", 65, {"bad.csv", "line 1", "schema_version"});
  std::ofstream(dir_ + "/text.txt") << "hello\nworld\n";
  expect_one_line("table text.txt", 65, {"text.txt", "line 1", "schema_version", "hello"});
  expect_one_line("table .", 66, {"no result files"});
}

TEST_F(Cli, UnwritableOutputIs74) {
  std::ofstream(dir_ + "/file") << "x";
  expect_one_line(std::string("check ") + kSmall + " --out file/sub", 74, {"file/sub"});
  expect_one_line(std::string("check ") + kSmall + " --out file", 74, {"file"});
}

TEST_F(Cli, FullDiskIs74AndFinishedRowsStay) {
  const Result r =
      run("check --op rmsnorm --case T=1:200:1,d=37,dtype=f32 --impl cpu_simd --out res",
          "ulimit -f 8;");
  EXPECT_EQ(r.code, 74) << r.err;
  EXPECT_NE(r.err.find("bench.csv"), std::string::npos) << r.err;
  const auto t = bench_csv("res");
  EXPECT_GT(t.rows.size(), 3u);
  EXPECT_LT(t.rows.size(), 200u);
  for (size_t i = 0; i < t.rows.size(); ++i) EXPECT_EQ(t.cell(i, "status"), "passed");
}

// Nobody may take a table for written that was not.
TEST_F(Cli, FullStandardOutputIs74) {
  for (const char* a : {"list --quick >/dev/full", "list --op rmsnorm >/dev/full", "--help >&-"}) {
    (void)run(std::string(a) + " 2>said; echo $? >code; true");
    EXPECT_EQ(slurp(dir_ + "/code"), "74\n") << a;
    const std::string said = slurp(dir_ + "/said");
    EXPECT_NE(said.find("standard output"), std::string::npos) << a << "\n" << said;
    EXPECT_EQ(std::count(said.begin(), said.end(), '\n'), 1) << a << "\n" << said;
  }
}

TEST_F(Cli, FullDiskOfLogitsIs74AndLeavesNothing) {
  const std::string golden = std::string(V3B_SOURCE_DIR) + "/tests/goldens/base_f32";
  const Result r = run("logits --model " + golden + " --tokens " + golden +
                           "/tokens.txt --backend cpu --dtype f32 --out l.npy",
                       "ulimit -f 2;");
  EXPECT_EQ(r.code, 74) << r.err;
  EXPECT_EQ(std::count(r.err.begin(), r.err.end(), '\n'), 1) << r.err;
  EXPECT_NE(r.err.find("l.npy"), std::string::npos) << r.err;
  EXPECT_FALSE(std::filesystem::exists(dir_ + "/l.npy"));
  EXPECT_FALSE(std::filesystem::exists(dir_ + "/l.npy.partial"));
}

TEST_F(Cli, FullDiskOfAScenarioIs74AndFinishedRowsStay) {
  const Result r = run(
      "scenario kv-cache --no-memory --no-step --presets tiny-v3 --contexts 1:4096:*2 --out res",
      "ulimit -f 4;");
  EXPECT_EQ(r.code, 74) << r.err;
  EXPECT_NE(r.err.find("kv_cache.csv"), std::string::npos) << r.err;
  const size_t rows = rep::read_csv(dir_ + "/res/kv_cache.csv").rows.size();
  EXPECT_GT(rows, 3u);
  const Result again = run(
      "scenario kv-cache --no-memory --no-step --presets tiny-v3 --contexts 1:4096:*2 --out res "
      "--resume");
  EXPECT_EQ(again.code, 0) << again.err;
  EXPECT_GT(rep::read_csv(dir_ + "/res/kv_cache.csv").rows.size(), rows);
}

TEST_F(Cli, WhatAKilledProcessLeftIsSweptUp) {
  const pid_t gone = fork();
  if (gone == 0) _exit(0);
  waitpid(gone, nullptr, 0);
  const std::string dead = std::to_string(gone), mine = std::to_string(getpid());
  std::filesystem::create_directories(dir_ + "/res");
  for (const std::string& name :
       {"bench.csv.tmp." + dead, "machine.json.tmp." + dead, ".v3bench-probe." + dead,
        "bench.csv.tmp." + mine, "notes.tmp." + dead, std::string("x.csv.tmp.old")})
    std::ofstream(dir_ + "/res/" + name) << "half";
  ASSERT_EQ(run(std::string("check ") + kSmall + " --out res").code, 0);
  std::set<std::string> left;
  for (const auto& e : std::filesystem::directory_iterator(dir_ + "/res"))
    left.insert(e.path().filename().string());
  EXPECT_EQ(left, (std::set<std::string>{"bench.csv", "machine.json", "bench.csv.tmp." + mine,
                                         "notes.tmp." + dead, "x.csv.tmp.old"}));
}

TEST_F(Cli, InterruptionKeepsFinishedRowsAndResumeDoesTheRest) {
  const std::string args =
      "check --op rmsnorm --case T=1:200:1,d=64 --impl cpu_simd --threads 1 --out res";
  const pid_t child = fork();
  ASSERT_GE(child, 0);
  if (child == 0) {
    if (chdir(dir_.c_str()) != 0) _exit(99);
    if (std::freopen((dir_ + "/err").c_str(), "w", stderr) == nullptr) _exit(99);
    execl(kBinary.c_str(), "v3bench", "check", "--op", "rmsnorm", "--case", "T=1:200:1,d=64",
          "--impl", "cpu_simd", "--threads", "1", "--out", "res", static_cast<char*>(nullptr));
    _exit(98);
  }
  const std::string csv = dir_ + "/res/bench.csv";
  for (int i = 0; i < 3000; ++i) {  // until a few rows are there
    const std::string text = slurp(csv);
    if (std::count(text.begin(), text.end(), '\n') > 3) break;
    std::this_thread::sleep_for(std::chrono::milliseconds(5));
  }
  kill(child, SIGINT);
  int status = 0;
  waitpid(child, &status, 0);
  ASSERT_TRUE(WIFEXITED(status));
  ASSERT_EQ(WEXITSTATUS(status), 130) << slurp(dir_ + "/err");
  EXPECT_NE(slurp(dir_ + "/err").find("--resume"), std::string::npos);
  const size_t before = rep::read_csv(csv).rows.size();
  EXPECT_GT(before, 2u);
  EXPECT_LT(before, 200u);
  const Result r = run(args + " --resume");
  EXPECT_EQ(r.code, 0) << r.err;
  const auto t = rep::read_csv(csv);
  EXPECT_EQ(t.rows.size(), 200u);
  std::set<std::string> cases;
  for (size_t i = 0; i < t.rows.size(); ++i) cases.insert(t.cell(i, "case"));
  EXPECT_EQ(cases.size(), 200u);
  EXPECT_NE(r.out.find("already done"), std::string::npos);
}

TEST_F(Cli, AFinishedBenchHasNothingLeftToResume) {
  const std::string args =
      "bench --device cpu --op rmsnorm --case T=2,d=64 --threads 1 --min-time 0.01 --out res";
  ASSERT_EQ(run(args).code, 0);
  const size_t rows = bench_csv("res").rows.size();
  const std::string before = slurp(dir_ + "/res/bench.csv");
  const Result r = run(args + " --resume");
  EXPECT_EQ(r.code, 0) << r.err;
  EXPECT_NE(r.out.find(std::to_string(rows) + " already done"), std::string::npos) << r.out;
  EXPECT_EQ(slurp(dir_ + "/res/bench.csv"), before);
}

TEST_F(Cli, SupportAndListAndInfo) {
  const Result s = run("support --op rmsnorm");
  EXPECT_EQ(s.code, 0);
  EXPECT_NE(s.out.find("rmsnorm.cpu_eigen"), std::string::npos);
  const Result csv = run("support --csv");
  EXPECT_EQ(csv.out.rfind("op,implementation,state,reason,cases,hardware\n", 0), 0u);
  std::ofstream(dir_ + "/s.csv") << csv.out;
  EXPECT_GT(rep::read_csv(dir_ + "/s.csv").rows.size(), 2u);
  EXPECT_NE(run("list --quick").out.find(" jobs"), std::string::npos);
  EXPECT_NE(run("info --no-peaks").out.find("processor"), std::string::npos);
}

// These hold for a CPU build anywhere and for a CUDA build on a machine without a GPU.
TEST_F(Cli, CudaJobsWithoutADevice) {
  if (run("support --device cuda --csv --op rmsnorm").out.find("cuda_simt,yes") !=
      std::string::npos)
    GTEST_SKIP() << "there is a GPU";
  const Result r = run(std::string("check --device cuda --out res ") + kSmall);
  EXPECT_EQ(r.code, 4) << r.err;
  const rep::CsvTable t = bench_csv("res");
  ASSERT_GT(t.rows.size(), 0u);
  for (size_t i = 0; i < t.rows.size(); ++i) {
    EXPECT_TRUE(t.cell(i, "status") == "not_built" || t.cell(i, "status") == "no_device");
    EXPECT_FALSE(t.cell(i, "reason").empty());
    EXPECT_EQ(t.cell(i, "device"), "cuda");
  }
  EXPECT_NE(slurp(dir_ + "/res/machine.json").find("\"gpu\""), std::string::npos);
  EXPECT_NE(run("support --op rmsnorm --device cuda").out.find("not yet run on hardware"),
            std::string::npos)
      << "no kernel has; when one has, take another here";
  const Result p = run(std::string("profile --impl cuda_simt ") + kSmall);
  EXPECT_EQ(p.code, 4);
  EXPECT_NE(p.out.find("ncu --nvtx --nvtx-include \"rmsnorm.cuda_simt/\""), std::string::npos);
  EXPECT_NE(p.out.find("--no-check"), std::string::npos);
}

TEST_F(Cli, EmulatedJobsAreCheckedButNeverTimed) {
  const std::string emulate = "V3BENCH_CUDA=emulate";
  const Result check = run(std::string("check --impl cuda_simt --out res ") + kSmall, emulate);
  if (bench_csv("res").cell(0, "status") == "no_device")
    GTEST_SKIP() << "a CUDA build has no emulation";
  EXPECT_EQ(check.code, 0) << check.err << check.out;
  EXPECT_EQ(bench_csv("res").cell(0, "status"), "passed");
  EXPECT_EQ(bench_csv("res").cell(0, "device"), "cuda_emulated");
  const Result bench = run(std::string("bench --impl cuda_simt --out timed ") + kSmall, emulate);
  EXPECT_EQ(bench.code, 4) << bench.err;
  EXPECT_EQ(bench_csv("timed").cell(0, "status"), "no_device");
  EXPECT_EQ(bench_csv("timed").cell(0, "reason"), "emulated: times mean nothing");
  EXPECT_EQ(bench_csv("timed").cell(0, "median_us"), "");
}

TEST_F(Cli, PlainProgressWithoutATerminal) {
  const Result r = run(std::string("check ") + kSmall);
  EXPECT_EQ(r.code, 0);
  EXPECT_EQ(r.err.find('\r'), std::string::npos);
  EXPECT_EQ(r.err.find('\x1b'), std::string::npos);
  EXPECT_NE(r.err.find("done in"), std::string::npos);
}

}  // namespace
}  // namespace v3b
