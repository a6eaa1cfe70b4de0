// Fibers, barriers and warp collectives of the emulation, and cuda.h on host memory.
#if defined(V3B_CUDA_EMULATE)
#include "kernels/core/cuda_emulation.h"

#include <sys/mman.h>

#include <algorithm>
#include <chrono>
#include <cstdlib>
#include <exception>
#include <memory>
#include <utility>
#include <vector>

#include "kernels/core/cuda.h"
#include "kernels/core/cuda_error.h"
#include "model/error.h"
#include "reference/spec/dtype.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

// void v3b_emu_switch(void** save, void* load): callee-saved registers and the stack pointer.
asm(R"(
.text
.type v3b_emu_switch, @function
v3b_emu_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size v3b_emu_switch, .-v3b_emu_switch
)");
extern "C" void v3b_emu_switch(void** save, void* load);

namespace v3b::kern::emu {

constinit thread_local ThreadIndex* self = nullptr;

namespace {

constexpr int kMaxThreads = 1024;                  // of a block, as on every device
constexpr int64_t kMaxShared = 227 * 1024;         // sm_90's opt-in limit
constexpr size_t kStackBytes = size_t{256} << 10;  // touched pages only; ASan frames are large

struct AsyncCopy {
  void* to;
  const void* from;
  int bytes;
};
struct Fiber {
  ThreadIndex index;
  void* sp = nullptr;
  bool done = false;
  std::vector<std::vector<AsyncCopy>> groups;  // committed, oldest first
  std::vector<AsyncCopy> open;
#if defined(__SANITIZE_ADDRESS__)
  void* fake_stack = nullptr;
#endif
};
struct Warp {
  unsigned arrived = 0, left = 0;
  alignas(32) uint8_t slots[32 * 32];
};
struct Block {
  std::vector<Fiber> fibers;
  std::vector<Warp> warps;
  int arrived = 0;
  int flag = 0, result = 0;  // of barrier_or
  uint64_t generation = 0;
  std::unique_ptr<uint8_t[]> shared_storage;
  uint8_t* shared = nullptr;
};

struct Machine {
  uint8_t* stacks = nullptr;
  Block block;
  Fiber* running = nullptr;
  void* scheduler_sp = nullptr;
  const std::function<void()>* body = nullptr;
  std::exception_ptr error;
  uint64_t progress = 0, launches = 0;
#if defined(__SANITIZE_ADDRESS__)
  void* scheduler_fake_stack = nullptr;
  const void* scheduler_bottom = nullptr;
  size_t scheduler_size = 0;
#endif
};
thread_local Machine machine;

uint8_t* stack_of(size_t i) { return machine.stacks + i * kStackBytes; }

void to_scheduler() {
  Machine& m = machine;
  Fiber& f = *m.running;
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(f.done ? nullptr : &f.fake_stack, m.scheduler_bottom,
                                 m.scheduler_size);
#endif
  v3b_emu_switch(&f.sp, m.scheduler_sp);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(f.fake_stack, &m.scheduler_bottom, &m.scheduler_size);
#endif
}

[[noreturn]] void fiber_entry() {
  Machine& m = machine;
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &m.scheduler_bottom, &m.scheduler_size);
#endif
  try {
    (*m.body)();
    if (!m.running->open.empty()) fail("cp.async without commit");
    for (const auto& g : m.running->groups)
      if (!g.empty()) fail("a thread ended before its cp.async arrived");
  } catch (...) {
    if (!m.error) m.error = std::current_exception();
  }
  m.running->done = true;
  ++m.progress;
  to_scheduler();
  std::abort();  // a finished fiber is never resumed
}

void resume(size_t i) {
  Machine& m = machine;
  Fiber& f = m.block.fibers[i];
  m.running = &f;
  self = &f.index;
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(&m.scheduler_fake_stack, stack_of(i), kStackBytes);
#endif
  v3b_emu_switch(&m.scheduler_sp, f.sp);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(m.scheduler_fake_stack, nullptr, nullptr);
#endif
}

void prepare_fiber(size_t i) {
  Fiber& f = machine.block.fibers[i];
  f.done = false;
  f.groups.clear();
  f.open.clear();
  // Six registers, then the return address; at entry the stack is 8 off a multiple of 16, as after a call.
  void** top = reinterpret_cast<void**>(stack_of(i) + kStackBytes - 64);
  *--top = nullptr;
  *--top = reinterpret_cast<void*>(&fiber_entry);
  for (int k = 0; k < 6; ++k) *--top = nullptr;
  f.sp = top;
}

void run_block(bool descending) {
  Machine& m = machine;
  Block& b = m.block;
  const size_t n = b.fibers.size();
  b.arrived = 0;
  for (auto& w : b.warps) w.arrived = w.left = 0;
  for (size_t i = 0; i < n; ++i) prepare_fiber(i);
  for (size_t done = 0; done < n;) {
    const uint64_t before = m.progress;
    done = 0;
    for (size_t k = 0; k < n; ++k) {
      const size_t i = descending ? n - 1 - k : k;
      if (!b.fibers[i].done) resume(i);
      if (m.error) {
        self = nullptr;
        std::rethrow_exception(std::exchange(m.error, nullptr));
      }
      done += b.fibers[i].done;
    }
    if (m.progress == before && done < n) {
      self = nullptr;
      throw Error(ExitCode::check_failed, "a barrier or warp collective that not all threads reach",
                  "CUDA emulation");
    }
  }
  self = nullptr;
}

void run_grid(dim3 grid, int threads, int64_t shared_bytes, const std::function<void()>& body) {
  Machine& m = machine;
  if (m.stacks == nullptr) {
    void* p = mmap(nullptr, kStackBytes * kMaxThreads, PROT_READ | PROT_WRITE,
                   MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (p == MAP_FAILED) throw std::bad_alloc();
    m.stacks = static_cast<uint8_t*>(p);
  }
  Block& b = m.block;
  b.fibers.resize(static_cast<size_t>(threads));
  b.warps.resize(static_cast<size_t>((threads + 31) / 32));
  b.shared_storage.reset(new uint8_t[static_cast<size_t>(shared_bytes) + 1024]);
  const auto at = reinterpret_cast<uintptr_t>(b.shared_storage.get());
  b.shared = b.shared_storage.get() + (1024 - at % 1024) % 1024;
  m.body = &body;
  const bool descending = m.launches++ % 2 == 1;
  for (unsigned z = 0; z < grid.z; ++z)
    for (unsigned y = 0; y < grid.y; ++y)
      for (unsigned x = 0; x < grid.x; ++x) {
        for (int t = 0; t < threads; ++t)
          b.fibers[size_t(t)].index = {dim3(unsigned(t), 0, 0), dim3(x, y, z),
                                       dim3(unsigned(threads)), grid};
        std::memset(b.shared, 0xFF, static_cast<size_t>(shared_bytes));  // NaN
        run_block(descending);
      }
}

std::vector<std::function<void()>>* capture = nullptr;

void submit(std::function<void()> work) {
  if (capture != nullptr)
    capture->push_back(std::move(work));
  else
    work();
}

}  // namespace

void fail(const char* what) { throw Error(ExitCode::check_failed, what, "CUDA emulation"); }

uint8_t* shared_memory() { return machine.block.shared; }

void enqueue(dim3 grid, int threads, int64_t shared_bytes, std::function<void()> body) {
  if (threads < 1 || threads > kMaxThreads) fail("a block of more than 1024 threads or none");
  if (shared_bytes > kMaxShared) fail("more than 227 KiB of shared memory");
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) fail("an empty grid");
  if (grid.y > 65535 || grid.z > 65535) fail("more than 65535 blocks along y or z");
  submit([=, body = std::move(body)] { run_grid(grid, threads, shared_bytes, body); });
}

void barrier() {
  Machine& m = machine;
  Block& b = m.block;
  const uint64_t mine = b.generation;
  ++m.progress;
  if (++b.arrived == static_cast<int>(b.fibers.size())) {
    b.arrived = 0;
    b.result = b.flag;
    b.flag = 0;
    ++b.generation;
    return;
  }
  while (b.generation == mine) to_scheduler();
}
int barrier_or(int p) {
  machine.block.flag |= p != 0;
  barrier();
  const int r = machine.block.result;
  barrier();
  return r;
}

const uint8_t* exchange(unsigned mask, const void* value, int bytes) {
  Machine& m = machine;
  const unsigned l = static_cast<unsigned>(lane()), bit = 1u << l;
  Warp& w = m.block.warps[self->thread.x >> 5];
  const unsigned threads = self->block_dim.x - (self->thread.x & ~31u);
  if (threads < 32) mask &= (1u << threads) - 1;  // a partial last warp
  if ((mask & bit) == 0) fail("a lane outside of its own mask");
  while (w.arrived & bit) to_scheduler();  // the others have not left the previous exchange
  std::memcpy(w.slots + 32 * l, value, static_cast<size_t>(bytes));
  w.arrived |= bit;
  ++m.progress;
  while ((w.arrived & mask) != mask) to_scheduler();
  return w.slots;
}
void release(unsigned mask) {
  Warp& w = machine.block.warps[self->thread.x >> 5];
  const unsigned threads = self->block_dim.x - (self->thread.x & ~31u);
  if (threads < 32) mask &= (1u << threads) - 1;
  w.left |= 1u << lane();
  ++machine.progress;
  if ((w.left & mask) == mask) {
    w.left &= ~mask;
    w.arrived &= ~mask;
  }
}
void warp_barrier(unsigned mask) {
  const int none = 0;
  exchange(mask, &none, sizeof none);
  release(mask);
}

void cp_async(void* to, const void* from, int bytes) {
  if (reinterpret_cast<uintptr_t>(to) % 16 || reinterpret_cast<uintptr_t>(from) % 16)
    fail("cp.async with an address that is not a multiple of 16");
  const auto* s = static_cast<const uint8_t*>(to);
  if (s < shared_memory()) fail("cp.async to an address before shared memory");
  std::memset(to, 0xFF, static_cast<size_t>(bytes));  // in flight: reading it now is an error
  machine.running->open.push_back({to, from, bytes});
}
void cp_async_commit() {
  machine.running->groups.push_back(std::exchange(machine.running->open, {}));
}
void cp_async_wait(int pending) {
  auto& groups = machine.running->groups;
  while (static_cast<int>(groups.size()) > pending) {
    for (const AsyncCopy& c : groups.front()) {
      if (c.from == nullptr)
        std::memset(c.to, 0, static_cast<size_t>(c.bytes));
      else
        std::memcpy(c.to, c.from, static_cast<size_t>(c.bytes));
    }
    groups.erase(groups.begin());
  }
}

void ldmatrix(uint32_t* r, int tiles, const void* row, bool transposed) {
  if (reinterpret_cast<uintptr_t>(row) % 16)
    fail("ldmatrix with an address that is not a multiple of 16");
  const uint8_t* slots = exchange(0xffffffffu, &row, sizeof row);
  const int g = lane() >> 2, t = lane() & 3;
  for (int j = 0; j < tiles; ++j) {
    uint16_t v[2];
    for (int e = 0; e < 2; ++e) {
      const int from_row = transposed ? 2 * t + e : g, column = transposed ? g : 2 * t + e;
      const uint16_t* p;
      std::memcpy(&p, slots + 32 * (8 * j + from_row), sizeof p);
      v[e] = p[column];
    }
    r[j] = v[0] | static_cast<uint32_t>(v[1]) << 16;
  }
  release(0xffffffffu);
}

namespace {
struct Operands {
  uint32_t a[4], b[2];
};
// Elements of one 32-bit register; `each` of them.
float element(uint32_t reg, int i, int each) {
  if (each == 2) return spec::to_float(spec::bf16{static_cast<uint16_t>(reg >> (16 * i))});
  return spec::to_float(spec::f8e4m3{static_cast<uint8_t>(reg >> (8 * i))});
}
void mma(float* d, const uint32_t* a, uint32_t b0, uint32_t b1, int each) {
  const Operands mine = {{a[0], a[1], a[2], a[3]}, {b0, b1}};
  const uint8_t* slots = exchange(0xffffffffu, &mine, sizeof mine);
  const int g = lane() >> 2, t = lane() & 3;
  const auto lane_of = [&](int i) {
    Operands o;
    std::memcpy(&o, slots + 32 * i, sizeof o);
    return o;
  };
  for (int half = 0; half < 2; ++half)  // of k
    for (int q = 0; q < 4; ++q) {       // the lane of a quad that holds these elements of k
      const Operands row = lane_of(4 * g + q), n0 = lane_of(4 * (2 * t) + q),
                     n1 = lane_of(4 * (2 * t + 1) + q);
      for (int e = 0; e < each; ++e) {
        const float lo = element(row.a[2 * half], e, each),
                    hi = element(row.a[2 * half + 1], e, each);
        const float x = element(n0.b[half], e, each), y = element(n1.b[half], e, each);
        d[0] += lo * x;
        d[1] += lo * y;
        d[2] += hi * x;
        d[3] += hi * y;
      }
    }
  release(0xffffffffu);
}
}  // namespace
void mma_bf16(float* d, const uint32_t* a, uint32_t b0, uint32_t b1) { mma(d, a, b0, b1, 2); }
void mma_e4m3(float* d, const uint32_t* a, uint32_t b0, uint32_t b1) { mma(d, a, b0, b1, 4); }

}  // namespace v3b::kern::emu

// ---- cuda.h on host memory ------------------------------------------------------------------------------------------
namespace v3b::kern {

const CudaDevice& cuda_device() {
  static const CudaDevice device = [] {
    CudaDevice d;
    const char* asked = std::getenv("V3BENCH_CUDA");
    if (asked != nullptr && std::strcmp(asked, "emulate") == 0) {
      d.mode = CudaMode::emulated;
      d.reason = "emulated on the host: checks only, times mean nothing";
      d.name = "emulated";
      d.cc = 90;
      d.sms = 4;
      d.memory_bytes = int64_t{4} << 30;
      d.l2_bytes = 1 << 20;
      d.shared_bytes = emu::kMaxShared;
    } else {
      d.reason = "built without CUDA (V3BENCH_CUDA=emulate checks the kernels on the host)";
    }
    return d;
  }();
  return device;
}
bool cuda_usable() { return cuda_device().mode == CudaMode::emulated; }
int64_t cuda_free_bytes() { return cuda_usable() ? cuda_device().memory_bytes : 0; }
bool cuda_lost() { return false; }
CudaStream cuda_stream() {
  if (!cuda_usable()) throw Error(ExitCode::nothing_ran, cuda_device().reason, "CUDA");
  static char stream;
  return reinterpret_cast<CudaStream>(&stream);
}
void cuda_synchronize(CudaStream) {
  if (emu::capture != nullptr) emu::fail("synchronization inside a graph capture");
}

DeviceBuffer::DeviceBuffer(int64_t bytes) : bytes_(bytes) {
  if (bytes > cuda_device().memory_bytes) throw CudaOutOfMemory(bytes);
  data_ = std::aligned_alloc(256, static_cast<size_t>((bytes + 255) / 256 * 256));
  if (data_ == nullptr && bytes > 0) throw CudaOutOfMemory(bytes);
  if (data_ != nullptr) std::memset(data_, 0xFF, static_cast<size_t>(bytes));
}
DeviceBuffer::~DeviceBuffer() { std::free(data_); }

void cuda_upload(void* device, const void* host, int64_t bytes, CudaStream) {
  if (emu::capture != nullptr) emu::fail("an upload inside a graph capture");
  if (bytes > 0)
    std::memcpy(device, host, static_cast<size_t>(bytes));  // else pointers may be null
}
void cuda_download(void* host, const void* device, int64_t bytes, CudaStream) {
  if (emu::capture != nullptr) emu::fail("a download inside a graph capture");
  if (bytes > 0) std::memcpy(host, device, static_cast<size_t>(bytes));
}
void cuda_copy(void* to, const void* from, int64_t bytes, CudaStream) {
  emu::submit([=] { std::memcpy(to, from, static_cast<size_t>(bytes)); });
}
void cuda_fill(void* device, int byte, int64_t bytes, CudaStream) {
  emu::submit([=] { std::memset(device, byte, static_cast<size_t>(bytes)); });
}
double cuda_seconds(CudaStream, void (*enqueue)(void*), void* context) {
  const auto t0 = std::chrono::steady_clock::now();
  enqueue(context);
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - t0).count();
}

struct CudaGraph::State {
  std::vector<std::function<void()>> nodes;
};
CudaGraph::CudaGraph() = default;
CudaGraph::~CudaGraph() = default;
CudaGraph::CudaGraph(CudaGraph&&) noexcept = default;
CudaGraph& CudaGraph::operator=(CudaGraph&&) noexcept = default;
bool CudaGraph::ready() const { return state_ != nullptr; }
void CudaGraph::begin(CudaStream) {
  if (emu::capture != nullptr) emu::fail("a graph capture inside another");
  state_ = std::make_unique<State>();
  emu::capture = &state_->nodes;
}
void CudaGraph::end(CudaStream) { emu::capture = nullptr; }
void CudaGraph::launch(CudaStream) {
  for (const auto& n : state_->nodes) n();
}

NvtxRange::NvtxRange(const char*) {}
NvtxRange::~NvtxRange() = default;

}  // namespace v3b::kern
#endif
