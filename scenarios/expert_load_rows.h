// Columns and shared pieces of the expert-load scenario. Internal to scenarios/expert_load*.cpp.
#pragma once
#include <string>
#include <vector>

#include "reports/csv.h"
#include "scenarios/expert_load.h"

namespace v3b::scen {

const std::vector<std::string>& expert_load_columns();
const std::vector<std::string>& expert_load_keys();
// max/mean, min/mean, CV, Gini, entropy, dead experts, MaxVio_global of a load.
void set_load(rep::Record& r, const std::vector<int64_t>& load);

void expert_load_model(const ExpertLoadOptions& o, rep::CsvWriter& csv);
void expert_load_training(const ExpertLoadOptions& o, rep::CsvWriter& csv);
void check_route_names(const ExpertLoadOptions& o);  // Error(usage) before anything runs for long
bool expert_load_routes(const ExpertLoadOptions& o,
                        rep::CsvWriter& csv);  // false: a kernel failed its check

}  // namespace v3b::scen
