// Published figures (SPEC 4) beside what is measured or computed here. Measured figures come from
// exact arithmetic (model/params.h), from an emulation run here, or from the other scenarios' CSV
// files in the same folder; none is typed in. Writes claims.csv; columns in reports/README.md.
#pragma once
#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "reports/csv.h"
#include "scenarios/common.h"

namespace v3b::scen {

struct ClaimsOptions : CommonOptions {};

// Reads kv_cache.csv, expert_load.csv, yarn_perplexity.csv and mtp_decoding.csv of `out` where they
// exist. `v3bench all` runs it after the scenarios. Throws v3b::Error.
int run_claims(const ClaimsOptions& o);

// ---- parts, for tests
// --------------------------------------------------------------------------------------
struct Claim {
  std::string id;  // SPEC 4's number, with a letter where one line makes several claims
  std::string claim, value, source, conditions;
  std::string kind;  // F: full scale or exact arithmetic; R: reduced scale; N: not measurable here
  std::string reason;  // why nothing is measured, where nothing is
};
const std::vector<Claim>& published_claims();

struct Finding {
  std::string measured;          // with its unit; "" if nothing
  std::optional<double> number;  // the main figure of `measured`
  std::string unit, from, scale, verdict, reason;
};
// What the folder's files and arithmetic say about one claim.
class Evidence {
 public:
  explicit Evidence(const std::string& dir);
  Finding find(const Claim& c) const;
  std::string params(const Finding& f) const;  // `params` of the rows that it was read from

 private:
  std::optional<rep::CsvTable> kv_, experts_, yarn_, mtp_;
};

inline constexpr const char* kHolds = "holds";
inline constexpr const char* kReduced = "holds at reduced scale";
inline constexpr const char* kFails = "does not hold";
inline constexpr const char* kUnmeasured = "cannot be measured here";

}  // namespace v3b::scen
