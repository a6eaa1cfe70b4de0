#include "bench/harness/nvml.h"

#include <dlfcn.h>
#include <fmt/format.h>

#include "kernels/core/cuda.h"
#include "reports/machine.h"

namespace v3b::bench {
namespace {

// The parts of NVML's C interface that are used, by its documentation.
using Device = struct nvmlDevice_st*;
constexpr int kOk = 0;
constexpr int kSmClock = 1, kMemClock = 2;  // nvmlClockType_t
constexpr int kGpuSensor = 0;               // nvmlTemperatureSensors_t
constexpr uint64_t kIdle = 1;

struct Reason {
  uint64_t bit;
  const char* name;
};
constexpr Reason kReasons[] = {{0x2, "application_clocks"},   {0x4, "sw_power_cap"},
                               {0x8, "hw_slowdown"},          {0x10, "sync_boost"},
                               {0x20, "sw_thermal_slowdown"}, {0x40, "hw_thermal_slowdown"},
                               {0x80, "hw_power_brake"},      {0x100, "display_clocks"}};

}  // namespace

struct Nvml::Api {
  void* library = nullptr;
  Device device = nullptr;
  int (*init)() = nullptr;
  int (*shutdown)() = nullptr;
  int (*by_bus)(const char*, Device*) = nullptr;
  int (*clock)(Device, int, unsigned*) = nullptr;
  int (*max_clock)(Device, int, unsigned*) = nullptr;
  int (*temperature)(Device, int, unsigned*) = nullptr;
  int (*power)(Device, unsigned*) = nullptr;
  int (*power_limit)(Device, unsigned*) = nullptr;
  int (*throttle)(Device, unsigned long long*) = nullptr;
  int (*energy)(Device, unsigned long long*) = nullptr;
  int (*ecc)(Device, int*, int*) = nullptr;
  int (*driver)(char*, unsigned) = nullptr;
  bool started = false;

  template <class F>
  void find(F*& f, const char* name) {
    f = reinterpret_cast<F*>(dlsym(library, name));
  }
  ~Api() {
    if (started && shutdown != nullptr) shutdown();
    if (library != nullptr) dlclose(library);
  }
};

std::string throttle_text(uint64_t reasons) {
  std::string s;
  uint64_t left = reasons & ~kIdle;
  for (const Reason& r : kReasons) {
    if ((left & r.bit) == 0) continue;
    s += (s.empty() ? "" : "+") + std::string(r.name);
    left &= ~r.bit;
  }
  if (left != 0) s += (s.empty() ? "" : "+") + fmt::format("0x{:x}", left);
  return s.empty() ? "none" : s;
}

Nvml::Nvml(const std::string& pci_bus_id, const char* library) {
  if (pci_bus_id.empty()) {
    reason_ = "no device";
    return;
  }
  auto api = std::make_unique<Api>();
  api->library = dlopen(library, RTLD_NOW | RTLD_LOCAL);
  if (api->library == nullptr) {
    reason_ = std::string(library) + " cannot be opened";
    return;
  }
  api->find(api->init, "nvmlInit_v2");
  api->find(api->shutdown, "nvmlShutdown");
  api->find(api->by_bus, "nvmlDeviceGetHandleByPciBusId_v2");
  api->find(api->clock, "nvmlDeviceGetClockInfo");
  api->find(api->max_clock, "nvmlDeviceGetMaxClockInfo");
  api->find(api->temperature, "nvmlDeviceGetTemperature");
  api->find(api->power, "nvmlDeviceGetPowerUsage");
  api->find(api->power_limit, "nvmlDeviceGetEnforcedPowerLimit");
  api->find(api->throttle, "nvmlDeviceGetCurrentClocksThrottleReasons");
  api->find(api->energy, "nvmlDeviceGetTotalEnergyConsumption");
  api->find(api->ecc, "nvmlDeviceGetEccMode");
  api->find(api->driver, "nvmlSystemGetDriverVersion");
  if (api->init == nullptr || api->by_bus == nullptr) {
    reason_ = std::string(library) + " lacks nvmlInit_v2 or nvmlDeviceGetHandleByPciBusId_v2";
    return;
  }
  if (const int e = api->init(); e != kOk) {
    reason_ = fmt::format("nvmlInit_v2 gives error {}", e);
    return;
  }
  api->started = true;
  if (const int e = api->by_bus(pci_bus_id.c_str(), &api->device); e != kOk) {
    reason_ = fmt::format("NVML does not know device {} (error {})", pci_bus_id, e);
    return;
  }
  api_ = std::move(api);
}
Nvml::~Nvml() = default;
bool Nvml::available() const { return api_ != nullptr; }

GpuReading Nvml::read() const {
  GpuReading r;
  if (!available()) return r;
  const Api& a = *api_;
  unsigned v = 0;
  unsigned long long w = 0;
  if (a.clock != nullptr && a.clock(a.device, kSmClock, &v) == kOk) r.sm_clock_mhz = v;
  if (a.clock != nullptr && a.clock(a.device, kMemClock, &v) == kOk) r.mem_clock_mhz = v;
  if (a.temperature != nullptr && a.temperature(a.device, kGpuSensor, &v) == kOk)
    r.temperature_c = v;
  if (a.power != nullptr && a.power(a.device, &v) == kOk) r.power_w = 1e-3 * v;
  if (a.energy != nullptr && a.energy(a.device, &w) == kOk) r.energy_mj = static_cast<double>(w);
  if (a.throttle != nullptr && a.throttle(a.device, &w) == kOk) r.throttle_reasons = w;
  return r;
}

std::map<std::string, std::string> Nvml::card() const {
  std::map<std::string, std::string> c;
  if (!available()) return c;
  const Api& a = *api_;
  unsigned v = 0;
  int on = 0, pending = 0;
  char text[96] = {};
  if (a.driver != nullptr && a.driver(text, sizeof text - 1) == kOk) c["driver"] = text;
  if (a.max_clock != nullptr && a.max_clock(a.device, kSmClock, &v) == kOk)
    c["max_sm_clock_mhz"] = std::to_string(v);
  if (a.max_clock != nullptr && a.max_clock(a.device, kMemClock, &v) == kOk)
    c["max_mem_clock_mhz"] = std::to_string(v);
  if (a.power_limit != nullptr && a.power_limit(a.device, &v) == kOk)
    c["power_limit_w"] = fmt::format("{:.0f}", 1e-3 * v);
  if (a.ecc != nullptr && a.ecc(a.device, &on, &pending) == kOk) c["ecc"] = on != 0 ? "on" : "off";
  return c;
}

const Nvml& nvml() {
  static const Nvml n(kern::cuda_device().mode == kern::CudaMode::device
                          ? kern::cuda_device().pci_bus_id
                          : std::string());
  return n;
}

void describe_gpu() {
  auto& gpu = rep::machine_card().gpu;
  if (!gpu.empty()) return;
  const kern::CudaDevice& d = kern::cuda_device();
  if (!d.runtime.empty()) gpu["cuda_runtime"] = d.runtime;
  if (!d.driver.empty()) gpu["cuda_driver"] = d.driver;
  switch (d.mode) {
    case kern::CudaMode::not_built:
    case kern::CudaMode::no_device:
      gpu["none"] = d.reason;
      return;
    case kern::CudaMode::emulated:
      gpu["none"] = "emulated on the host: checks only";
      return;
    case kern::CudaMode::device:
      break;
  }
  gpu["name"] = d.name;
  gpu["compute_capability"] = fmt::format("{}.{}", d.cc / 10, d.cc % 10);
  gpu["sms"] = std::to_string(d.sms);
  gpu["memory_bytes"] = std::to_string(d.memory_bytes);
  gpu["l2_bytes"] = std::to_string(d.l2_bytes);
  gpu["shared_bytes_per_block"] = std::to_string(d.shared_bytes);
  for (const auto& [key, value] : nvml().card()) gpu[key] = value;
  if (!nvml().available()) gpu["nvml"] = "no: " + nvml().reason();
}

}  // namespace v3b::bench
