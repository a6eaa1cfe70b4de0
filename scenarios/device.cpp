#include "scenarios/device.h"

#include "bench/harness/cuda_mirror.h"
#include "bench/harness/jobs.h"
#include "model/error.h"

namespace v3b::scen {

void choose_device(CommonOptions& o, const std::string& device) {
  if (device.empty()) return;
  if (device != "cpu" && device != "cuda")
    throw Error(ExitCode::usage, "unknown device", "--device", "cpu or cuda", "'" + device + "'");
  const auto swap = [&](const std::string& from, const std::string& to) {
    if (o.backend.starts_with(from)) o.backend = to + o.backend.substr(from.size());
  };
  if (device == "cpu") return swap("cuda_", "cpu_");
  swap("cpu_", "cuda_");
  if (!on_cuda(o))
    throw Error(ExitCode::usage, "the backend has no CUDA form", "--device cuda, --backend",
                "cpu_bf16, cpu_f32, cuda_bf16 or cuda_f32", o.backend);
}

bool on_cuda(const CommonOptions& o) { return bench::device_of(o.backend) == "cuda"; }
std::string device_column(const CommonOptions& o) { return bench::device_column(o.backend); }

bool device_timed(const CommonOptions& o) {
  return !on_cuda(o) || kern::cuda_device().mode != kern::CudaMode::emulated;
}

std::string device_missing(const CommonOptions& o) {
  if (!on_cuda(o)) return "";
  switch (bench::cuda_support().state) {
    case bench::Support::State::not_built:
      return "not_built";
    case bench::Support::State::no_device:
      return "no_device";
    case bench::Support::State::unsupported:
      return "unsupported";
    case bench::Support::State::yes:
      break;
  }
  return "";
}

rep::Record& set_device_missing(rep::Record& r, const CommonOptions& o) {
  return r.set("status", device_missing(o)).set("reason", bench::cuda_support().reason);
}

void finish_device(const CommonOptions& o) {
  if (device_missing(o).empty()) return;
  throw Error(ExitCode::nothing_ran, bench::cuda_support().reason, "backend " + o.backend);
}

}  // namespace v3b::scen
