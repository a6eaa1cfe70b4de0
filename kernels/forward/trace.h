// What a pass of the CPU backend is made of: every kernel call goes through traced(). Without a trace it is the plain
// call. With one, the call is noted with its name and sizes, and timed alone: run several times over where it stands in
// the pass, on the very operands, the caches emptied before each time if the trace asks for it (`v3bench closure`).
#pragma once
#include <cstdint>
#include <functional>
#include <initializer_list>
#include <string>
#include <utility>
#include <vector>

namespace v3b::kern {

struct TraceCall {
  std::string component, shape;  // "gemm", "m=1,n=352,k=256"
  std::vector<double> alone_us;  // one a repetition
  double in_pass_us =
      0;  // the call itself; what it finds in the caches is the pass's own without repetitions
};
struct Trace {
  int repetitions = 5;           // 0: nothing but the pass, every call timed
  std::function<void()> before;  // of each repetition; may be empty
  std::vector<TraceCall> calls;  // in the order of the pass
};
using TraceShape = std::initializer_list<std::pair<const char*, int64_t>>;

// The trace of this thread's passes; null: none. Lives until the next set_trace.
void set_trace(Trace* trace) noexcept;
Trace* current_trace() noexcept;
// Memory that a repeated call must find as the first one did: it adds to it or writes over its own input.
struct TraceKeep {
  void* data = nullptr;
  int64_t bytes = 0;
};
// The repetitions, then the call.
void trace_call(Trace& trace, const char* component, TraceShape shape, TraceKeep keep,
                const std::function<void()>& call);

template <class F>
void traced(const char* component, TraceShape shape, TraceKeep keep, const F& call) {
  if (Trace* t = current_trace(); t != nullptr) [[unlikely]]
    trace_call(*t, component, shape, keep, call);
  else
    call();
}
template <class F>
void traced(const char* component, TraceShape shape, const F& call) {
  traced(component, shape, TraceKeep{}, call);
}

}  // namespace v3b::kern
