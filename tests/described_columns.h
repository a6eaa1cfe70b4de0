// Every column of a scenario's file must be described in its section of reports/README.md.
#pragma once
#include <gtest/gtest.h>

#include <algorithm>
#include <fstream>
#include <sstream>
#include <string>
#include <vector>

#include "reports/identity.h"

namespace v3b {

inline void expect_columns_described(const std::string& file,
                                     const std::vector<std::string>& header) {
  std::ifstream in(std::string(V3B_SOURCE_DIR) + "/reports/README.md");
  std::ostringstream text;
  text << in.rdbuf();
  const std::string all = text.str();
  const size_t begin = all.find("## " + file), end = all.find("\n## ", begin + 1);
  ASSERT_NE(begin, std::string::npos) << file;
  const std::string section = all.substr(begin, end - begin);
  const auto& identity = rep::identity_columns();
  for (const auto& c : header)
    if (std::find(identity.begin(), identity.end(), c) == identity.end()) {
      EXPECT_NE(section.find("`" + c + "`"), std::string::npos) << c;
    }
}

}  // namespace v3b
