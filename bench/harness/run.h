// The loop over jobs: check, then time what passed, one CSV row a job.
#pragma once
#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "bench/harness/jobs.h"
#include "bench/harness/time.h"
#include "reports/row.h"

namespace v3b::bench {

struct RunOptions {
  bool time = false;  // false: verdicts only
  uint64_t seed = 1;
  int64_t threads = 0;  // for `params` and `repro`; 0: all
  TimeOptions timing;
  double suspect_margin =
      0.10;                // an implied rate beyond the measured peak by more than this is suspect
  bool unchecked = false;  // time without a verdict: status "unchecked", never "passed"
  bool resume = false;  // a job in which the run before ended without a word becomes an error row
};

struct RunSummary {
  int64_t jobs = 0, passed = 0, failed = 0, suspect = 0, errors = 0, not_run = 0, skipped = 0,
          timed = 0, unchecked = 0;
  std::string device_lost_in;  // the job whose CUDA fault ended the run early; "" none
};

// Rows are written as they come (when `out` is given; finished ones of a resumed file are skipped)
// and handed to `on_row`. CUDA jobs of a case are timed as a group of their own, against the GPU's peaks; not at all on
// the emulation. A CUDA fault ends the run: its row is status error, stop_reason fault, which --resume keeps.
RunSummary run_jobs(const std::vector<JobGroup>& groups, const RunOptions& options,
                    rep::CsvWriter* out, const std::function<void(const rep::Row&)>& on_row);

}  // namespace v3b::bench
