// The dependency rules of DESIGN 1: who may include whom, and no weak symbols in files for one
// instruction set.
#include <gtest/gtest.h>

#include <cstdio>
#include <filesystem>
#include <fstream>
#include <map>
#include <regex>
#include <set>
#include <string>
#include <vector>

#include "bench/ops/registry.h"

namespace {

namespace fs = std::filesystem;
const std::string kRoot = V3B_SOURCE_DIR;

struct Include {
  std::string file, header;
  int line = 0;
  bool quoted = false;
};

std::vector<Include> includes_under(const std::string& folder) {
  static const std::regex pattern(R"(^\s*#\s*include\s*([<"])([^>"]+)[>"])");
  std::vector<Include> out;
  if (!fs::exists(kRoot + "/" + folder)) return out;
  for (const auto& entry : fs::recursive_directory_iterator(kRoot + "/" + folder)) {
    const std::string ext = entry.path().extension();
    if (ext != ".h" && ext != ".cpp" && ext != ".cu" && ext != ".cuh") continue;
    std::ifstream in(entry.path());
    std::string text;
    std::smatch m;
    for (int line = 1; std::getline(in, text); ++line)
      if (std::regex_search(text, m, pattern))
        out.push_back({fs::relative(entry.path(), kRoot), m[2], line, m[1] == "\""});
  }
  return out;
}

// "reference/spec/x.h" -> its longest known folder.
std::string layer_of(const std::string& header) {
  for (const char* layer : {"reference/spec", "kernels/core", "kernels/forward", "kernels/train",
                            "bench/harness", "bench/ops", "bench/main", "model", "reference",
                            "kernels", "scenarios", "reports", "bench", "tests"})
    if (header.rfind(std::string(layer) + "/", 0) == 0) return layer;
  return "";
}

// Quoted includes of our own folders that `folder` may have; and system headers that it may not.
void expect_layer(const std::string& folder, const std::set<std::string>& allowed,
                  const std::vector<std::string>& forbidden_system,
                  const std::string& except_under = "") {
  const auto found = includes_under(folder);
  EXPECT_FALSE(found.empty()) << folder;
  for (const auto& i : found) {
    if (!except_under.empty() && i.file.rfind(except_under, 0) == 0) continue;
    const std::string layer = layer_of(i.header);
    if (!layer.empty()) {
      EXPECT_TRUE(allowed.count(layer) != 0)
          << i.file << ":" << i.line << " includes " << i.header << " of " << layer;
    }
    for (const auto& f : forbidden_system)
      EXPECT_EQ(i.header.find(f), std::string::npos)
          << i.file << ":" << i.line << " includes " << i.header;
  }
}

TEST(Layers, SpecKnowsOnlyIntegerHeaders) {
  for (const auto& i : includes_under("reference/spec")) {
    const bool own = i.quoted && layer_of(i.header) == "reference/spec";
    const bool integer = i.header == "cstdint" || i.header == "cstddef" || i.header == "bit";
    EXPECT_TRUE(own || integer) << i.file << ":" << i.line << " includes " << i.header;
  }
}

TEST(Layers, ModelKnowsSpec) {
  expect_layer("model", {"model", "reference/spec"},
               {"Eigen", "dnnl", "hwy/", "benchmark/", "CLI/"});
}
TEST(Layers, ReferenceKnowsSpecModelAndEigen) {
  expect_layer("reference", {"reference", "reference/spec", "model"},
               {"dnnl", "hwy/", "benchmark/", "CLI/", "nlohmann"}, "reference/spec");
}
TEST(Layers, KernelsNeverKnowReferenceOrEigen) {
  expect_layer(
      "kernels",
      {"kernels", "kernels/core", "kernels/forward", "kernels/train", "reference/spec", "model"},
      {"Eigen", "benchmark/", "CLI/", "nlohmann"});
}
TEST(Layers, ReportsKnowRowsNotOps) {
  expect_layer("reports", {"reports", "model"}, {"Eigen", "dnnl", "hwy/", "benchmark/", "CLI/"});
}
TEST(Layers, HarnessKnowsNoReference) {
  expect_layer("bench/harness",
               {"bench/harness", "reference/spec", "model", "reports", "kernels/core"},
               {"Eigen", "CLI/"});
}
TEST(Layers, OpsAreWhereReferenceAndKernelsMeet) {
  expect_layer("bench/ops",
               {"bench/ops", "bench/harness", "reference", "reference/spec", "kernels",
                "kernels/core", "kernels/forward", "kernels/train", "model"},
               {"CLI/", "benchmark/"});
}
// Scenarios pick a backend by name; of the kernels they know the forward, and training its step.
TEST(Layers, ScenariosKnowNoOtherKernels) {
  expect_layer("scenarios",
               {"scenarios", "bench/harness", "bench/ops", "reference", "reference/spec", "model",
                "reports", "kernels/core", "kernels/forward", "kernels/train"},
               {"Eigen", "dnnl", "hwy/", "benchmark/", "CLI/"});
}
TEST(Layers, ModelHeadersThatReportsUseAreErrorAndHash) {
  for (const auto& i : includes_under("reports"))
    if (layer_of(i.header) == "model") {
      EXPECT_TRUE(i.header == "model/error.h" || i.header == "model/hash.h")
          << i.file << " includes " << i.header;
    }
}

TEST(Layers, FilesStayReadable) {
  for (const char* folder :
       {"model", "reference", "kernels", "bench", "scenarios", "reports", "tests"})
    for (const auto& entry : fs::recursive_directory_iterator(kRoot + "/" + folder)) {
      const std::string ext = entry.path().extension();
      if (ext != ".h" && ext != ".cpp" && ext != ".cu") continue;
      std::ifstream in(entry.path());
      int lines = 0;
      for (std::string text; std::getline(in, text);) ++lines;
      EXPECT_LE(lines, 500) << entry.path();
    }
}

// DESIGN 2: implementation name = file stem = CSV key, so that `find . -name '*<op>*'` shows all of
// an op. cpu_eigen is the reference's own code (reference/, DESIGN 2).
TEST(Layers, EveryImplementationHasAFileOfItsName) {
  std::set<std::string> stems;  // "mla_decode.cpu_simd": a file's name up to the second dot
  for (const auto& entry : fs::recursive_directory_iterator(kRoot + "/kernels")) {
    const std::string name = entry.path().filename();
    const size_t first = name.find('.');
    if (entry.is_regular_file() && first != std::string::npos)
      stems.insert(name.substr(0, name.find('.', first + 1)));
  }
  int names = 0;
  for (const auto& op : v3b::bench::all_ops()) {
    EXPECT_TRUE(fs::exists(kRoot + "/bench/ops/" + op->name() + ".cpp")) << op->name();
    for (const auto& full : op->impls()) {
      const std::string how = full.substr(0, full.find('@'));  // "@avx2": a level of the same file
      if (how == "cpu_eigen") continue;
      ++names;
      EXPECT_EQ(stems.count(op->name() + "." + how), 1u)
          << "no kernels/**/" << op->name() << "." << how << ".cpp or .cu";
    }
  }
  EXPECT_GE(names, 20);
}

// Objects compiled for one instruction set may define no weak symbol: the linker could take their
// copy of an inline function for the baseline path and die with SIGILL on an older CPU.
TEST(Layers, IsaObjectsHaveNoWeakSymbols) {
  int objects = 0;
  for (const auto& entry : fs::recursive_directory_iterator(V3B_BINARY_DIR)) {
    const std::string name = entry.path().filename();
    if (entry.path().extension() != ".o") continue;
    if (name.find("avx512") == std::string::npos && name.find("amx") == std::string::npos) continue;
    ++objects;
    const std::string command = "nm -C --defined-only '" + entry.path().string() + "'";
    FILE* pipe = popen(command.c_str(), "r");
    ASSERT_NE(pipe, nullptr);
    char line[4096];
    while (std::fgets(line, sizeof line, pipe) != nullptr) {
      const std::string text = line;
      const size_t type = text.find(' ');
      if (type == std::string::npos || type + 1 >= text.size()) continue;
      const char t = text[type + 1];
      // A pointer to the C++ runtime's personality routine: data that is the same everywhere.
      if (text.find("DW.ref.__gxx_personality_v0") != std::string::npos) continue;
      // The sanitizers' own per-file constructors are weak by design.
      if (text.find("asan") != std::string::npos || text.find("ubsan") != std::string::npos)
        continue;
      EXPECT_TRUE(t != 'W' && t != 'V' && t != 'u' && t != 'w' && t != 'v') << name << ": " << text;
    }
    EXPECT_EQ(pclose(pipe), 0) << command;
  }
  EXPECT_GE(objects, 3) << "no objects of one instruction set under " << V3B_BINARY_DIR;
}

}  // namespace
