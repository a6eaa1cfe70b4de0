#include "bench/harness/cuda_mirror.h"

#include <algorithm>
#include <cstring>
#include <sstream>

#include "model/error.h"

namespace v3b::bench {
namespace {

constexpr int64_t kGuard = 256;  // bytes before and after; keeps the data's alignment
constexpr int kGuardByte = 0xA7;

}  // namespace

CudaMirror::CudaMirror(std::vector<HostTensor*> tensors) {
  const auto stream = kern::cuda_stream();
  for (HostTensor* t : tensors) {
    const int64_t padded = (t->bytes() + 255) / 256 * 256;
    Copy c{t, kern::DeviceBuffer(padded + 2 * kGuard)};
    kern::cuda_fill(c.buffer.data(), kGuardByte, c.buffer.bytes(), stream);
    if (t->bytes() > 0)
      kern::cuda_upload(c.buffer.as<uint8_t>() + kGuard, t->data(), t->bytes(), stream);
    copies_.push_back(std::move(c));
  }
}

const void* CudaMirror::device_of(const void* host) const {
  if (host == nullptr) return nullptr;
  const auto at = reinterpret_cast<uintptr_t>(host);
  for (const Copy& c : copies_) {
    const auto first = reinterpret_cast<uintptr_t>(c.tensor->data());
    if (at >= first && at < first + static_cast<uintptr_t>(std::max<int64_t>(1, c.tensor->bytes())))
      return c.buffer.as<uint8_t>() + kGuard + (at - first);
  }
  throw Error(ExitCode::check_failed, "pointer into no mirrored tensor", "CudaMirror");
}

void* CudaMirror::scratch(int64_t bytes) {
  extra_.emplace_back(std::max<int64_t>(bytes, 1));
  kern::cuda_fill(extra_.back().data(), 0xFF, extra_.back().bytes(), kern::cuda_stream());
  return extra_.back().data();
}
void* CudaMirror::upload(const void* host, int64_t bytes) {
  void* p = scratch(bytes);
  kern::cuda_upload(p, host, bytes, kern::cuda_stream());
  return p;
}

void CudaMirror::poison_outputs() {
  const auto stream = kern::cuda_stream();
  for (const Copy& c : copies_)
    if (c.tensor->role() == Role::output)
      kern::cuda_fill(c.buffer.as<uint8_t>() + kGuard, 0xFF, c.tensor->bytes(), stream);
}

void CudaMirror::fetch() {
  const auto stream = kern::cuda_stream();
  std::vector<uint8_t> band(kGuard + 256);
  for (Copy& c : copies_) {
    const int64_t data = c.tensor->bytes(), tail = c.buffer.bytes() - kGuard - data;
    const uint8_t* base = c.buffer.as<uint8_t>();
    const auto intact = [&](const uint8_t* from, int64_t n) {
      band.resize(static_cast<size_t>(n));
      kern::cuda_download(band.data(), from, n, stream);
      return std::all_of(band.begin(), band.end(), [](uint8_t b) { return b == kGuardByte; });
    };
    if (!intact(base, kGuard) || !intact(base + kGuard + data, tail))
      throw Error(ExitCode::check_failed,
                  "wrote outside of '" + c.tensor->name() + "' on the device", "check");
    // Inputs come back too: the check compares them with what they were.
    if (data > 0) kern::cuda_download(c.tensor->data(), base + kGuard, data, stream);
  }
}

Support cuda_support(int min_cc, bool hardware_only) {
  const kern::CudaDevice& d = kern::cuda_device();
  switch (d.mode) {
    case kern::CudaMode::not_built:
      return {Support::State::not_built, d.reason};
    case kern::CudaMode::no_device:
      return {Support::State::no_device, d.reason};
    case kern::CudaMode::emulated:
      if (hardware_only)
        return {Support::State::not_built, "a library or kernel that the emulation cannot run"};
      return {};
    case kern::CudaMode::device:
      break;
  }
  if (d.cc < min_cc)
    return {Support::State::unsupported, "needs compute capability " + std::to_string(min_cc / 10) +
                                             "." + std::to_string(min_cc % 10) + ", " + d.name +
                                             " has " + std::to_string(d.cc / 10) + "." +
                                             std::to_string(d.cc % 10)};
  return {};
}

Support cuda_emulation_limit(double flop, double most) {
  if (kern::cuda_device().mode != kern::CudaMode::emulated || flop <= most) return {};
  std::ostringstream reason;
  reason << "too large for the emulation: more than " << most / 1e9 << " GFLOP";
  return {Support::State::unsupported, reason.str()};
}

std::string cuda_isa() {
  const kern::CudaDevice& d = kern::cuda_device();
  return d.mode == kern::CudaMode::emulated ? "emulated" : "sm_" + std::to_string(d.cc);
}

Runner cuda_runner(std::shared_ptr<CudaMirror> mirror, std::function<void(kern::CudaStream)> launch,
                   const std::string& name) {
  Runner r;
  const auto stream = kern::cuda_stream();
  auto shared = std::make_shared<std::function<void(kern::CudaStream)>>(std::move(launch));
  r.run = [shared, stream, name] {
    const kern::NvtxRange range(name.c_str());
    (*shared)(stream);
    kern::cuda_synchronize(stream);
  };
  r.timed_run = [shared, stream, name] {
    const kern::NvtxRange range(name.c_str());
    return kern::cuda_seconds(stream, [&] { (*shared)(stream); });
  };
  r.poison = [mirror] { mirror->poison_outputs(); };
  r.fetch = [mirror] { mirror->fetch(); };
  r.resolved_isa = cuda_isa();
  return r;
}

}  // namespace v3b::bench
