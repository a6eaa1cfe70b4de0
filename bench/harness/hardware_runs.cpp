#include "bench/harness/hardware_runs.h"

#include <set>
#include <sstream>

#include "bench/harness/jobs.h"
#include "v3b_hardware_runs.h"

namespace v3b::bench {

std::string hardware_text(const std::string& impl, const std::string& csv) {
  const size_t dot = impl.find('.');
  if (dot == std::string::npos || device_of(impl.substr(dot + 1)) != "cuda") return "";
  std::set<std::string> gpus;
  std::istringstream in(csv);
  for (std::string line; std::getline(in, line);) {
    const size_t a = line.find(','), b = line.find(',', a + 1);
    if (a != std::string::npos && b != std::string::npos && line.substr(0, a) == impl)
      gpus.insert(line.substr(a + 1, b - a - 1));
  }
  std::string text;
  for (const auto& g : gpus) text += (text.empty() ? "" : ", ") + g;
  return text.empty() ? kNotYetOnHardware : text;
}

std::string hardware_text(const std::string& impl) { return hardware_text(impl, kHardwareRunsCsv); }

}  // namespace v3b::bench
