// claims.csv: verdicts follow arithmetic and the other files, and change with them.
#include <gtest/gtest.h>

#include <filesystem>
#include <fstream>
#include <set>
#include <sstream>

#include "model/error.h"
#include "reports/table.h"
#include "scenarios/claims.h"
#include "tests/described_columns.h"

namespace v3b {
namespace {

namespace fs = std::filesystem;

std::string fresh_dir(const std::string& name) {
  const fs::path p = fs::temp_directory_path() / ("v3b_test_claims_" + name);
  fs::remove_all(p);
  fs::create_directories(p);
  return p.string();
}
void write(const std::string& path, const std::string& text) { std::ofstream(path) << text; }

scen::Finding find(const std::string& dir, const std::string& id) {
  const scen::Evidence e(dir);
  for (const auto& c : scen::published_claims())
    if (c.id == id) return e.find(c);
  ADD_FAILURE() << id;
  return {};
}

TEST(Claims, EveryClaimOfTheSpecHasAVerdict) {
  const std::string dir = fresh_dir("all");
  scen::ClaimsOptions o;
  o.out = dir;
  o.print_table = false;
  ASSERT_EQ(scen::run_claims(o), 0);
  const auto t = rep::read_csv(dir + "/claims.csv");
  std::set<int> numbers;
  const std::set<std::string> verdicts = {scen::kHolds, scen::kReduced, scen::kFails,
                                          scen::kUnmeasured};
  for (size_t i = 0; i < t.rows.size(); ++i) {
    numbers.insert(std::stoi(t.cell(i, "number")));
    EXPECT_TRUE(verdicts.count(t.cell(i, "verdict"))) << t.cell(i, "number");
    if (t.cell(i, "verdict") == scen::kUnmeasured) {
      EXPECT_NE(t.cell(i, "reason"), "") << t.cell(i, "number");
      EXPECT_EQ(t.cell(i, "measured"), "") << t.cell(i, "number");
    } else {
      EXPECT_NE(t.cell(i, "measured"), "") << t.cell(i, "number");
      EXPECT_NE(t.cell(i, "measured_from"), "") << t.cell(i, "number");
      EXPECT_NE(t.cell(i, "scale"), "") << t.cell(i, "number");
    }
  }
  EXPECT_EQ(numbers.size(), 49u);  // SPEC 4
  EXPECT_EQ(*numbers.rbegin(), 49);
  EXPECT_NE(rep::render_table(dir + "/claims.csv").find("671.026 B"), std::string::npos);
}

TEST(Claims, ExactFigures) {  // SPEC 0.3, 0.4, 0.5
  const std::string dir = fresh_dir("exact");
  for (const auto& [id, number] : {std::pair{"1a", 671.0264192},
                                   {"1b", 36.625618432},
                                   {"2a", 684.531386},
                                   {"3a", 70.272},
                                   {"4", 512.0 / 9},
                                   {"11", 656.0},
                                   {"22a", 11.507286272}}) {
    const auto f = find(dir, id);
    ASSERT_TRUE(f.number) << id;
    EXPECT_NEAR(*f.number, number, 1e-6 * number) << id;
    EXPECT_EQ(f.verdict, std::string(id) == "4" ? scen::kFails : scen::kHolds) << id;
  }
  EXPECT_NEAR(*find(dir, "5").number, 250.4, 0.1);
}

TEST(Claims, MeasuredOnesFollowTheFiles) {
  const std::string dir = fresh_dir("files");
  for (const char* id : {"19", "20", "28", "34", "35"})
    EXPECT_EQ(find(dir, id).verdict, scen::kUnmeasured) << id;

  const auto mtp = [&](double high, double speed) {
    std::ostringstream s;
    s << "kind,model,decoding,drafts,position,forced_acceptance,domain,acceptance,acceptance_low,"
         "acceptance_high,measured_speedup,verify_over_base,draft_over_base\n"
      << "position,m,greedy,1,1,,all," << high - 0.05 << ',' << high - 0.1 << ',' << high << ",,,\n"
      << "summary,m,greedy,1,,0.5,all,,,,9,1,0\n"
      << "summary,m,greedy,1,,0.9,all,,,," << speed << ",1.1,0.1\n";
    write(dir + "/mtp_decoding.csv", s.str());
  };
  mtp(0.88, 1.8);
  EXPECT_EQ(find(dir, "19").verdict, scen::kReduced);
  EXPECT_EQ(find(dir, "20").verdict, scen::kReduced);
  EXPECT_EQ(*find(dir, "20").number, 1.8);  // not the one at 50%
  mtp(0.7, 1.2);
  EXPECT_EQ(find(dir, "19").verdict, scen::kFails);
  EXPECT_EQ(find(dir, "20").verdict, scen::kFails);

  const auto yarn = [&](double y, double n, double p, double high) {
    std::ostringstream s;
    s << "kind,model,finetune_steps,status,variant,factor,trained_context,bin_begin,bin_end,ppl,"
         "vs_none_nll,vs_none_high\n"
      << "bin,m,0,ok,none,,512,512,4096,100,,\n"
      << "bin,m,0,ok,yarn,2,512,512,4096,99,-1,-1\n"  // does not cover 4096
      << "bin,m,0,ok,yarn,8,512,512,4096," << y << ",-1," << high << '\n'
      << "bin,m,0,ok,ntk,8,512,512,4096," << n << ",-1,-1\n"
      << "bin,m,0,ok,pi,8,512,512,4096," << p << ",-1,-1\n"
      << "bin,m,0,ok,pi,8,512,0,4096,1,-1,-1\n";
    write(dir + "/yarn_perplexity.csv", s.str());
  };
  yarn(10, 20, 30, -0.5);
  EXPECT_EQ(find(dir, "34").verdict, scen::kReduced);
  EXPECT_EQ(*find(dir, "34").number, 10);
  EXPECT_EQ(find(dir, "35").verdict, scen::kReduced);
  yarn(20, 10, 30, 0.1);
  EXPECT_EQ(find(dir, "34").verdict, scen::kFails);
  EXPECT_EQ(find(dir, "35").verdict, scen::kFails);

  const auto load = [&](double bias, double other) {
    std::ostringstream s;
    s << "part,model,strategy,tokens,maxvio_batch,val_loss\n"
      << "training,m,bias,10,9,9\ntraining,m,bias,20," << bias << ',' << bias << '\n'
      << "training,m,switch,20," << other << ',' << other << '\n';
    write(dir + "/expert_load.csv", s.str());
  };
  load(0.1, 0.5);
  EXPECT_EQ(find(dir, "28").verdict, scen::kReduced);
  load(0.6, 0.5);
  EXPECT_EQ(find(dir, "28").verdict, scen::kFails);
  EXPECT_EQ(find(dir, "30").verdict, scen::kUnmeasured);  // no sequence loss there
}

TEST(Claims, BadFilesAreErrors) {
  const std::string dir = fresh_dir("bad");
  write(dir + "/mtp_decoding.csv",
        "kind,model,decoding,drafts,position,forced_acceptance,domain,acceptance,acceptance_low,"
        "acceptance_high\nposition,m,greedy,1,1,,all,many,0,1\n");
  EXPECT_THROW(find(dir, "19"), Error);
}

TEST(Claims, EveryColumnIsDescribed) {
  const std::string dir = fresh_dir("columns");
  scen::ClaimsOptions o;
  o.out = dir;
  o.print_table = false;
  ASSERT_EQ(scen::run_claims(o), 0);
  expect_columns_described("claims.csv", rep::read_csv(dir + "/claims.csv").header);
}

}  // namespace
}  // namespace v3b
