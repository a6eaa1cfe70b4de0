// bench.csv as one table an op: verdict beside time beside the roof, every implementation of a case
// together.
#include <algorithm>
#include <map>

#include "reports/row.h"
#include "reports/table.h"

namespace v3b::rep {

std::vector<std::string> table_bench(const CsvTable& t) {
  std::vector<std::string> blocks, ops;
  std::map<std::string, std::vector<std::vector<std::string>>> by_op;
  std::map<std::string, int64_t> absent;  // what this build or machine does not have: a line each
  for (size_t i = 0; i < t.rows.size(); ++i) {
    const std::string& op = t.cell(i, "op");
    if (t.cell(i, "status") == "not_built" || t.cell(i, "status") == "no_device") {
      ++absent[t.cell(i, "reason")];
      continue;
    }
    if (by_op.count(op) == 0) ops.push_back(op);
    const std::string& roof = t.cell(i, "roof");
    std::string verdict = t.cell(i, "status");
    if (verdict != "passed" && !t.cell(i, "reason").empty()) verdict += ": " + t.cell(i, "reason");
    const auto pct = t.number(i, "pct_of_roof");
    by_op[op].push_back({t.cell(i, "case"), t.cell(i, "impl"), t.cell(i, "resolved_isa"), verdict,
                         short_number(t.number(i, "err_over_bound"), 2), t.cell(i, "cache_state"),
                         short_time_us(t.number(i, "median_us")),
                         short_number(t.number(i, "gflop_s")), short_number(t.number(i, "gb_s")),
                         pct ? short_number(pct, 2) + "% " + roof : ""});
  }
  for (const auto& op : ops) {
    using enum Align;
    blocks.push_back(
        "**" + op + "**\n\n" +
        markdown_table({"case", "implementation", "ran as", "verdict", "error/bound", "cache",
                        "median", "GFLOP/s", "GB/s", "of roof"},
                       by_op[op],
                       {left, left, left, left, right, left, right, right, right, right}));
  }
  for (const auto& [reason, n] : absent)
    blocks.push_back(std::to_string(n) + " jobs did not run: " + reason + "\n");
  return blocks;
}

}  // namespace v3b::rep
