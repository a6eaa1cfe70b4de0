// What NVML says about the GPU: clocks, throttling, temperature, power, energy. The library comes with the driver and is
// opened at run time under our own prototypes (nvml.cpp), so nothing of it is needed to build; without it, everything
// is blank.
#pragma once
#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <string>

namespace v3b::bench {

// One look at the device. Fields that this device or driver does not give are blank.
struct GpuReading {
  std::optional<double> sm_clock_mhz, mem_clock_mhz, temperature_c, power_w;
  std::optional<double> energy_mj;           // since the driver was loaded
  std::optional<uint64_t> throttle_reasons;  // bits as NVML defines them
};

// What a timed CUDA job adds to its row (reports/README.md).
struct GpuLoad {
  std::optional<double> sm_clock_mhz, mem_clock_mhz, temperature_c, power_w;
  std::optional<double> energy_mj;  // of one run
  std::string throttle;             // throttle_text of all looks together; "" unknown
};

// "none", or reasons joined by +: "sw_power_cap+hw_thermal_slowdown". Being idle is no throttling.
std::string throttle_text(uint64_t reasons);

class Nvml {
 public:
  // pci_bus_id as CUDA gives it. `library`: other file names are for tests.
  explicit Nvml(const std::string& pci_bus_id, const char* library = "libnvidia-ml.so.1");
  ~Nvml();
  Nvml(const Nvml&) = delete;
  Nvml& operator=(const Nvml&) = delete;
  bool available() const;
  const std::string& reason() const { return reason_; }  // unless available
  GpuReading read() const;
  // What stays: driver, clock limits, power limit, ECC. For machine.json.
  std::map<std::string, std::string> card() const;

 private:
  struct Api;
  std::unique_ptr<Api> api_;
  std::string reason_;
};

// Of CUDA's device 0; not available where there is none.
const Nvml& nvml();

// Fills machine.json's gpu section (name, capability, memory, driver, runtime, clocks, power limit, ECC) or the reason
// why there is no GPU. Safe to call often.
void describe_gpu();

}  // namespace v3b::bench
