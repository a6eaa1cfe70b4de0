#include "reports/compare.h"

#include <algorithm>
#include <filesystem>
#include <map>
#include <set>

#include "reports/table.h"

namespace v3b::rep {
namespace {

std::string csv_path(const std::string& path) {
  return std::filesystem::is_directory(path) ? path + "/bench.csv" : path;
}

std::string key_of(const BenchRow& b) {
  const char sep = '\x1f';
  const Row& r = b.row;
  return r.op + sep + r.impl + sep + r.case_text + sep + r.dtype + sep + r.cache_state + sep +
         b.device;
}

std::map<std::string, BenchRow> load(const std::string& path, std::set<std::string>& machines,
                                     std::vector<std::string>& warnings) {
  std::vector<std::string> more;
  std::map<std::string, BenchRow> rows;
  for (auto& b : read_bench_csv(path, &more)) {
    machines.insert(b.machine);
    const std::string key = key_of(b);
    if (rows.count(key) != 0)
      warnings.push_back(path + ": two rows of " + b.row.impl + "/" + b.row.case_text +
                         ", the later one counts");
    rows[key] = std::move(b);
  }
  warnings.insert(warnings.end(), more.begin(), more.end());
  return rows;
}

std::string joined(const std::set<std::string>& s) {
  std::string out;
  for (const auto& x : s) out += (out.empty() ? "" : " ") + x;
  return out.empty() ? "none" : out;
}

bool bad(const Row& r) {
  return r.status == "failed" || r.status == "error" || r.status == "suspect";
}

ComparedRow compare_pair(const Row* base, const Row* now, double threshold_pct) {
  const Row& any = base != nullptr ? *base : *now;
  ComparedRow c{any.impl, any.case_text, any.cache_state};
  if (base != nullptr) c.base_us = base->median_us;
  if (now != nullptr) c.new_us = now->median_us;
  if (base != nullptr && now != nullptr && base->status == "passed" && bad(*now)) {
    c.change = Change::broken;
    c.note = now->status + ": " + now->reason;
  } else if (base == nullptr || now == nullptr || !base->timed() || !now->timed()) {
    c.change = Change::missing;
    const Row* other = base == nullptr || !base->timed() ? base : now;
    c.note = std::string(other == base ? "not in BASE" : "not in NEW");
    if (other != nullptr)
      c.note = std::string(other == base ? "no time in BASE" : "no time in NEW") + " (" +
               other->status + ")";
  } else {
    c.change = judge_change(*base, *now, threshold_pct);
    c.change_pct = 100 * (*now->median_us / *base->median_us - 1);
  }
  return c;
}

}  // namespace

const char* change_name(Change c) {
  switch (c) {
    case Change::unchanged:
      return "unchanged";
    case Change::improvement:
      return "improvement";
    case Change::regression:
      return "regression";
    case Change::ambiguous:
      return "ambiguous";
    case Change::broken:
      return "broken";
    case Change::missing:
      return "missing";
  }
  return "?";
}

Change judge_change(const Row& base, const Row& now, double threshold_pct) {
  const double b = *base.median_us, n = *now.median_us;
  const double pct = 100 * (n / b - 1);
  if (pct >= -threshold_pct && pct <= threshold_pct) return Change::unchanged;
  const double b1 = base.q1_us.value_or(b), b3 = base.q3_us.value_or(b);
  const double n1 = now.q1_us.value_or(n), n3 = now.q3_us.value_or(n);
  if (n1 > b3 && pct > 0) return Change::regression;
  if (n3 < b1 && pct < 0) return Change::improvement;
  return Change::ambiguous;
}

Comparison compare_files(const std::string& base, const std::string& now, const CompareOptions& o) {
  Comparison result;
  std::set<std::string> base_machines, now_machines;
  const auto b = load(csv_path(base), base_machines, result.warnings);
  const auto n = load(csv_path(now), now_machines, result.warnings);
  if (base_machines != now_machines && !o.allow_different_machines)
    throw Error(ExitCode::machines_differ,
                "times of different machines are not compared (--allow-different-machines)", now,
                "machine " + joined(base_machines), joined(now_machines));
  std::set<std::string> keys;
  for (const auto& [k, row] : b) keys.insert(k);
  for (const auto& [k, row] : n) keys.insert(k);
  int64_t paired = 0;
  for (const auto& k : keys) {
    const auto ib = b.find(k), in = n.find(k);
    const Row* rb = ib == b.end() ? nullptr : &ib->second.row;
    const Row* rn = in == n.end() ? nullptr : &in->second.row;
    // Verdict-only rows and rows that cannot run here have nothing to compare unless they broke.
    const bool times = (rb != nullptr && rb->timed()) || (rn != nullptr && rn->timed());
    const bool broke = rb != nullptr && rn != nullptr && rb->status == "passed" && bad(*rn);
    if (!times && !broke) continue;
    result.rows.push_back(compare_pair(rb, rn, o.threshold_pct));
    paired += result.rows.back().change != Change::missing;
    ++result.counts[static_cast<int>(result.rows.back().change)];
  }
  const auto rank = [](const ComparedRow& r) {
    static const int order[] = {5, 4, 1, 2, 0, 3};  // by Change
    return order[static_cast<int>(r.change)];
  };
  std::stable_sort(
      result.rows.begin(), result.rows.end(), [&](const ComparedRow& x, const ComparedRow& y) {
        return rank(x) != rank(y) ? rank(x) < rank(y)
                                  : x.change_pct.value_or(0) > y.change_pct.value_or(0);
      });
  const auto counted = [&](Change c) { return result.counts[static_cast<int>(c)]; };
  if (counted(Change::regression) + counted(Change::broken) > 0)
    result.code = ExitCode::regression;
  else if (counted(Change::missing) > 0)
    result.code = ExitCode::case_missing;
  else if (counted(Change::ambiguous) > 0 && o.fail_on_ambiguous)
    result.code = ExitCode::ambiguous;
  else if (paired == 0)
    result.code = ExitCode::nothing_ran;
  return result;
}

std::string comparison_table(const Comparison& c, bool all_rows) {
  std::vector<std::vector<std::string>> rows;
  for (const auto& r : c.rows) {
    if (r.change == Change::unchanged && !all_rows) continue;
    std::string pct;
    if (r.change_pct) pct = (*r.change_pct > 0 ? "+" : "") + short_number(r.change_pct, 2) + "%";
    rows.push_back({change_name(r.change), r.impl, r.case_text, r.cache_state,
                    short_time_us(r.base_us), short_time_us(r.new_us), pct, r.note});
  }
  using enum Align;
  std::string out;
  if (!rows.empty())
    out = markdown_table(
              {"change", "implementation", "case", "cache", "base", "new", "median", "note"}, rows,
              {left, left, left, left, right, right, right, left}) +
          "\n";
  for (int i = 0; i < 6; ++i)
    out += (i > 0 ? ", " : "") + std::to_string(c.counts[i]) + " " +
           change_name(static_cast<Change>(i));
  return out + "\n";
}

}  // namespace v3b::rep
