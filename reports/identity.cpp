#include "reports/identity.h"

#include <chrono>
#include <ctime>
#include <random>

#include "reports/machine.h"
#include "v3b_build_info.h"

namespace v3b::rep {
namespace {

std::string format_utc(const char* pattern) {
  const std::time_t now = std::chrono::system_clock::to_time_t(std::chrono::system_clock::now());
  std::tm utc{};
  gmtime_r(&now, &utc);
  char text[32];
  std::strftime(text, sizeof text, pattern, &utc);
  return text;
}

}  // namespace

std::string utc_now() { return format_utc("%Y-%m-%dT%H:%M:%SZ"); }

const std::string& run_id() {
  static const std::string id = [] {
    static const char* digits = "0123456789abcdef";
    std::random_device rd;
    std::string tail;
    for (int i = 0; i < 4; ++i) tail += digits[rd() & 15u];
    return format_utc("%Y%m%dT%H%M%SZ-") + tail;
  }();
  return id;
}

Identity identity(const std::string& device) {
  Identity id;
  id.run_id = run_id();
  id.utc_time = utc_now();
  id.commit = V3B_GIT_COMMIT;
  id.dirty = V3B_GIT_DIRTY != 0;
  id.machine = machine_card().id;
  id.device = device;
  return id;
}

const std::vector<std::string>& identity_columns() {
  static const std::vector<std::string> columns = {
      "schema_version", "run_id", "utc_time", "commit", "dirty", "machine", "device"};
  return columns;
}

std::vector<std::string> with_identity(const std::vector<std::string>& columns) {
  std::vector<std::string> all = identity_columns();
  all.insert(all.end(), columns.begin(), columns.end());
  return all;
}

}  // namespace v3b::rep
