// closure.csv: one table a forward pass, its components by their share, what they leave unexplained last.
#include <map>

#include "reports/table.h"

namespace v3b::rep {

std::vector<std::string> table_closure(const CsvTable& t) {
  using enum Align;
  std::vector<std::string> order, blocks;
  std::map<std::string, std::vector<std::vector<std::string>>> by_case;
  std::map<std::string, std::string> not_run;
  for (size_t i = 0; i < t.rows.size(); ++i) {
    const std::string key = "**" + t.cell(i, "op") + "** " + t.cell(i, "case");
    if (by_case.count(key) == 0) order.push_back(key);
    auto& rows = by_case[key];
    if (t.cell(i, "component").empty()) {
      not_run[key] = t.cell(i, "status") + ": " + t.cell(i, "reason");
      continue;
    }
    const auto share = t.number(i, "share_pct");
    rows.push_back({t.cell(i, "component"), t.cell(i, "shape"), t.cell(i, "calls"),
                    short_time_us(t.number(i, "median_us")), short_time_us(t.number(i, "total_us")),
                    share ? short_number(share) + "%" : "",
                    short_time_us(t.number(i, "in_pass_us"))});
  }
  for (const auto& key : order)
    blocks.push_back(
        key + "\n\n" +
        (not_run.count(key) != 0
             ? not_run[key] + "\n"
             : markdown_table({"component", "shape", "calls", "alone", "together", "of the pass",
                               "in the pass"},
                              by_case[key], {left, left, right, right, right, right, right})));
  return blocks;
}

}  // namespace v3b::rep
