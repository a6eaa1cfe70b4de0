// The measured decode step of the kv-cache scenario: one layer's attention core over a cache of a
// given length, through the harness (checked in the same process before it is timed). Internal to
// scenarios/kv_cache*.cpp.
#pragma once
#include <cstdint>
#include <string>

#include "bench/harness/jobs.h"
#include "reports/row.h"
#include "scenarios/kv_cache.h"

namespace v3b::scen {

struct StepCase {
  std::string op, how, text;  // a harness job; `text` is its case
  std::string reason;         // why there is none
};
StepCase step_case(const KvForm& f, model::KvElem e, const model::ModelConfig& c, int64_t context,
                   int64_t batch, int64_t page, const spec::Flags& flags = {}, bool cuda = false);
// Why a case is not run: its data is larger than the limit, or than the free memory allows. "" if
// it can.
std::string step_memory_problem(const bench::Ops& ops, const StepCase& s, double limit_gb);
// The row with the job's verdict and time.
rep::Record& add_step(rep::Record& r, const rep::Row& job);

}  // namespace v3b::scen
