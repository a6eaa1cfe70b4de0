// Two bench.csv files against each other (`v3bench compare BASE NEW`): rows are paired by op,
// implementation, case, dtype, cache state and device.
#pragma once
#include <string>
#include <vector>

#include "model/error.h"
#include "reports/row.h"

namespace v3b::rep {

struct CompareOptions {
  double threshold_pct = 5;  // a change of the median below it is no change
  bool fail_on_ambiguous = false;
  bool allow_different_machines = false;
};

// unchanged: the medians differ by no more than the threshold.
// regression, improvement: more than that, and the quartile ranges do not overlap.
// ambiguous: more than that, but the quartile ranges overlap.
// broken: passed in BASE, failed, suspect or error in NEW (counts as a regression).
// missing: timed on one side only.
enum class Change { unchanged, improvement, regression, ambiguous, broken, missing };
const char* change_name(Change c);

struct ComparedRow {
  std::string impl, case_text, cache_state;
  Change change = Change::unchanged;
  std::optional<double> base_us, new_us, change_pct;
  std::string note;
};
struct Comparison {
  std::vector<ComparedRow> rows;  // worst first
  int64_t counts[6] = {};
  std::vector<std::string> warnings;
  ExitCode code = ExitCode::ok;  // 2 before 5 before 3; 4 when no row could be paired
};

// Judges one pair of rows that both have times.
Change judge_change(const Row& base, const Row& now, double threshold_pct);

// Paths are CSV files or folders with a bench.csv. Throws Error(machines_differ) unless allowed.
Comparison compare_files(const std::string& base, const std::string& now,
                         const CompareOptions& options);
std::string comparison_table(const Comparison& c, bool all_rows);

}  // namespace v3b::rep
