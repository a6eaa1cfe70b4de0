// The identity columns that every CSV row starts with (DESIGN 5).
#pragma once
#include <string>
#include <vector>

namespace v3b::rep {

inline constexpr int kSchemaVersion = 1;

struct Identity {
  int schema_version = kSchemaVersion;
  std::string run_id;    // one a process: UTC start time and a random tail
  std::string utc_time;  // now, 2026-11-22T04:43:00Z
  std::string commit;    // of the built sources; "" when built outside git
  bool dirty = false;    // sources differed from the commit when built
  std::string machine;   // short stable id of the machine card (machine.h)
  std::string device;    // "cpu", "cuda"
};
Identity identity(const std::string& device);

const std::vector<std::string>& identity_columns();
// identity_columns() followed by `columns`.
std::vector<std::string> with_identity(const std::vector<std::string>& columns);

std::string utc_now();
const std::string& run_id();

}  // namespace v3b::rep
