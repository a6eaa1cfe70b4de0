#include "kernels/forward/trace.h"

#include <chrono>
#include <cstring>

namespace v3b::kern {
namespace {

double us_of(const std::function<void()>& call) {
  const auto t0 = std::chrono::steady_clock::now();
  call();
  return std::chrono::duration<double, std::micro>(std::chrono::steady_clock::now() - t0).count();
}

thread_local Trace* g_trace = nullptr;
}  // namespace

void set_trace(Trace* trace) noexcept { g_trace = trace; }
Trace* current_trace() noexcept { return g_trace; }

void trace_call(Trace& trace, const char* component, TraceShape shape, TraceKeep keep,
                const std::function<void()>& call) {
  TraceCall c;
  c.component = component;
  for (const auto& [key, value] : shape) {
    if (!c.shape.empty()) c.shape += ',';
    c.shape.append(key).append("=").append(std::to_string(value));
  }
  std::vector<char> kept(trace.repetitions > 0 ? static_cast<size_t>(keep.bytes) : 0);
  if (!kept.empty()) std::memcpy(kept.data(), keep.data, kept.size());
  for (int i = 0; i < trace.repetitions; ++i) {
    if (trace.before) trace.before();
    c.alone_us.push_back(us_of(call));
    if (!kept.empty()) std::memcpy(keep.data, kept.data(), kept.size());
  }
  c.in_pass_us = us_of(call);
  trace.calls.push_back(std::move(c));
}

}  // namespace v3b::kern
