// train.csv and the check of the options. Internal to scenarios/training*.cpp.
#pragma once
#include <memory>
#include <string>

#include "reports/csv.h"
#include "scenarios/training.h"

namespace v3b::scen {

// Columns of reports/README.md, identity first. What is no number stays blank.
class TrainLog {
 public:
  // "": nothing is written. Resuming keeps the rows up to last_step (in any column order; columns
  // that the file lacks become blank) and drops those after it: they are made again.
  // params: of every row.
  TrainLog(const std::string& path, bool resume, int64_t last_step, std::string params = "");
  void add(const TrainRow& r);

 private:
  std::string params_;
  std::unique_ptr<rep::CsvWriter> csv_;
};

// Throws Error(usage) naming the flag, what it may be and the value found; NaN is never right.
void check_train_options(const TrainOptions& o);

}  // namespace v3b::scen
