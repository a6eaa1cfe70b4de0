#include "kernels/forward/trace.h"

#include <chrono>
#include <cstring>

namespace v3b::kern {
namespace {
thread_local Trace* g_trace = nullptr;
}  // namespace

void set_trace(Trace* trace) noexcept { g_trace = trace; }
Trace* current_trace() noexcept { return g_trace; }

void trace_call(Trace& trace, const char* component, TraceShape shape, TraceKeep keep,
                const std::function<void()>& call) {
  TraceCall c;
  c.component = component;
  for (const auto& [key, value] : shape)
    c.shape += (c.shape.empty() ? "" : ",") + std::string(key) + "=" + std::to_string(value);
  std::vector<char> kept(static_cast<size_t>(keep.bytes));
  if (keep.bytes > 0) std::memcpy(kept.data(), keep.data, kept.size());
  for (int i = 0; i < trace.repetitions; ++i) {
    if (trace.before) trace.before();
    const auto t0 = std::chrono::steady_clock::now();
    call();
    const auto t1 = std::chrono::steady_clock::now();
    c.alone_us.push_back(std::chrono::duration<double, std::micro>(t1 - t0).count());
    if (keep.bytes > 0) std::memcpy(keep.data, kept.data(), kept.size());
  }
  trace.calls.push_back(std::move(c));
}

}  // namespace v3b::kern
