// claims.csv: what was compared as a table, the rest as a count by reason.
#include <algorithm>
#include <map>

#include "reports/table.h"

namespace v3b::rep {

std::vector<std::string> table_claims(const CsvTable& t) {
  std::vector<std::vector<std::string>> rows;
  std::map<std::string, std::string> unmeasured;  // reason -> numbers
  std::vector<std::string> order;
  for (size_t i = 0; i < t.rows.size(); ++i) {
    if (t.cell(i, "verdict") == "cannot be measured here") {
      const std::string& why = t.cell(i, "reason");
      if (unmeasured.count(why) == 0) order.push_back(why);
      auto& numbers = unmeasured[why];
      numbers += (numbers.empty() ? "" : ", ") + t.cell(i, "number");
      continue;
    }
    rows.push_back({t.cell(i, "number"), t.cell(i, "claim"), t.cell(i, "published"),
                    t.cell(i, "measured"), t.cell(i, "scale"), t.cell(i, "verdict"),
                    t.cell(i, "reason")});
  }
  std::vector<std::string> blocks;
  if (!rows.empty())
    blocks.push_back(
        markdown_table({"no.", "claim", "published", "here", "scale", "verdict", "note"}, rows));
  std::string rest;
  for (const auto& why : order)
    rest += (rest.empty() ? "" : "\n") + std::string("- no. ") + unmeasured[why] + ": " + why;
  if (!rest.empty()) blocks.push_back("Cannot be measured here:\n\n" + rest);
  return blocks;
}

}  // namespace v3b::rep
