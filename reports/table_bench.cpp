// bench.csv as one table an op: verdict beside time beside the roof, every implementation of a case
// together.
#include <algorithm>
#include <map>

#include "reports/row.h"
#include "reports/table.h"

namespace v3b::rep {

namespace {

struct Best {
  size_t row = 0;
  double us = 0;
};

// "mla_decode.cpu_simd@avx2" -> "avx2", without a level: "".
std::string level_of(const std::string& impl) {
  const size_t at = impl.find('@');
  return at == std::string::npos ? "" : impl.substr(at + 1);
}

}  // namespace

// One line a timed case and device: our fastest beside the fastest peer, then our other levels.
std::string table_peers(const CsvTable& t) {
  if (!t.has_column("peer")) return "";
  struct Cell {
    std::optional<Best> ours, peer;
    std::map<std::string, double> levels;
  };
  std::vector<std::string> order, levels;
  std::map<std::string, Cell> cells;
  for (size_t i = 0; i < t.rows.size(); ++i) {
    const auto us = t.number(i, "median_us");
    if (!us || t.cell(i, "status") != "passed") continue;
    const std::string key = t.cell(i, "op") + "\n" + t.cell(i, "case") + "\n" +
                            t.cell(i, "cache_state") + "\n" + t.cell(i, "device");
    if (cells.count(key) == 0) order.push_back(key);
    Cell& c = cells[key];
    const std::string level = level_of(t.cell(i, "impl"));
    if (!level.empty()) {
      double& best = c.levels.try_emplace(level, *us).first->second;
      best = std::min(best, *us);
      if (std::find(levels.begin(), levels.end(), level) == levels.end()) levels.push_back(level);
      continue;
    }
    auto& best = t.cell(i, "peer") == "1" ? c.peer : c.ours;
    if (!best || *us < best->us) best = Best{i, *us};
  }
  std::sort(levels.begin(), levels.end());
  std::vector<std::string> header = {"op",      "case",      "ours",       "ran as",     "median",
                                     "of roof", "best peer", "its median", "peer / ours"};
  for (const auto& l : levels) header.push_back(l);
  std::vector<std::vector<std::string>> rows;
  for (const auto& key : order) {
    const Cell& c = cells[key];
    if (!c.ours) continue;
    const size_t i = c.ours->row;
    const auto pct = t.number(i, "pct_of_roof");
    const auto how = [&](size_t row) {
      return t.cell(row, "impl").substr(t.cell(row, "op").size() + 1);
    };
    rows.push_back({t.cell(i, "op"), t.cell(i, "case"), how(i), t.cell(i, "resolved_isa"),
                    short_time_us(c.ours->us),
                    pct ? short_number(pct, 2) + "% " + t.cell(i, "roof") : "",
                    c.peer ? how(c.peer->row) : "none", c.peer ? short_time_us(c.peer->us) : "",
                    c.peer ? short_number(c.peer->us / c.ours->us) : ""});
    for (const auto& l : levels) {
      const auto at = c.levels.find(l);
      rows.back().push_back(at == c.levels.end() ? "" : short_time_us(at->second));
    }
  }
  if (rows.empty()) return "";
  using enum Align;
  std::vector<Align> align = {left, left, left, left, right, right, left, right, right};
  align.resize(header.size(), right);
  return "**Ours against the fastest peer** (medians of one run; the last columns are ours at "
         "lower "
         "instruction-set levels)\n\n" +
         markdown_table(header, rows, align);
}

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
  if (std::string peers = table_peers(t); !peers.empty()) blocks.push_back(std::move(peers));
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
