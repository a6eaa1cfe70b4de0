// cuda.h on the CUDA runtime. The driver is loaded by the statically linked runtime; a machine without one gets
// CudaMode::no_device and one clear line.
#include <dlfcn.h>
#include <nvtx3/nvToolsExt.h>

#include <atomic>
#include <chrono>
#include <cstdlib>
#include <cstring>
#include <thread>

#include "kernels/core/cuda_device.cuh"
#include "kernels/core/cuda_error.h"
#include "model/error.h"

namespace v3b::kern {
namespace {

constexpr int kOldestCc = 80;
constexpr double kHangSeconds = 60;  // no kernel of this suite takes a tenth of it

std::atomic<bool> g_lost = false;

std::string version_text(int v) {
  return std::to_string(v / 1000) + "." + std::to_string(v % 1000 / 10);
}

CudaDevice look_up() {
  CudaDevice d;
  d.mode = CudaMode::no_device;
  int runtime = 0, driver = 0, count = 0;
  cudaRuntimeGetVersion(&runtime);
  d.runtime = version_text(runtime);
  cudaDriverGetVersion(&driver);
  d.driver = driver > 0 ? version_text(driver) : "";
  const cudaError_t e = cudaGetDeviceCount(&count);
  if (driver == 0) {
    d.reason = "no NVIDIA driver on this machine";
    return d;
  }
  if (e == cudaErrorInsufficientDriver) {
    d.reason = "the driver (CUDA " + d.driver + ") is older than this build's runtime (CUDA " +
               d.runtime + ")";
    return d;
  }
  if (e != cudaSuccess || count == 0) {
    d.reason = std::string("no usable CUDA device: ") +
               (e == cudaSuccess ? "the driver lists none" : cudaGetErrorString(e));
    cudaGetLastError();
    return d;
  }
  cudaDeviceProp p = {};
  if (const cudaError_t pe = cudaGetDeviceProperties(&p, 0); pe != cudaSuccess) {
    d.reason = std::string("device 0 cannot be asked: ") + cudaGetErrorString(pe);
    return d;
  }
  d.name = p.name;
  d.cc = 10 * p.major + p.minor;
  d.sms = p.multiProcessorCount;
  d.memory_bytes = static_cast<int64_t>(p.totalGlobalMem);
  d.l2_bytes = p.l2CacheSize;
  d.shared_bytes = static_cast<int64_t>(p.sharedMemPerBlockOptin);
  char bus[32] = {};
  if (cudaDeviceGetPCIBusId(bus, sizeof bus, 0) == cudaSuccess) d.pci_bus_id = bus;
  if (d.cc < kOldestCc) {
    d.reason = d.name + " has compute capability " + std::to_string(p.major) + "." +
               std::to_string(p.minor) + "; the kernels need 8.0 or later";
    return d;
  }
  d.mode = CudaMode::device;
  return d;
}

// Holds the device until the host has enqueued everything; gives up after half a second, so that an `enqueue` that
// waits for the device cannot hang.
__global__ void hold(const volatile int* go) {
  const long long t0 = clock64();
  while (*go == 0 && clock64() - t0 < 1000000000LL) {
  }
}

// Errors after which every call of the process fails.
bool is_fault(cudaError_t e) {
  switch (e) {
    case cudaErrorIllegalAddress:
    case cudaErrorMisalignedAddress:
    case cudaErrorInvalidAddressSpace:
    case cudaErrorIllegalInstruction:
    case cudaErrorInvalidPc:
    case cudaErrorLaunchFailure:
    case cudaErrorLaunchTimeout:
    case cudaErrorHardwareStackError:
    case cudaErrorAssert:
    case cudaErrorECCUncorrectable:
    case cudaErrorDeviceUninitialized:
    case cudaErrorContextIsDestroyed:
    case cudaErrorContained:
    case cudaErrorUnknown:
      return true;
    default:
      return false;
  }
}

// Polls, so that a kernel that never ends is an error and not a process that hangs: in a tight loop at first, for
// times that are short, later with pauses.
template <class Query>
void wait_for(Query&& query, const char* what) {
  using Clock = std::chrono::steady_clock;
  const auto t0 = Clock::now();
  for (;;) {
    const cudaError_t e = query();
    if (e != cudaErrorNotReady) return cuda_check(e, what);
    const double s = std::chrono::duration<double>(Clock::now() - t0).count();
    if (s > kHangSeconds) {
      g_lost = true;
      throw CudaFault(what, "a kernel that has not ended after a minute");
    }
    if (s > 0.01) std::this_thread::sleep_for(std::chrono::microseconds(200));
  }
}

struct Timing {
  cudaEvent_t start = nullptr, stop = nullptr;
  int* go = nullptr;      // pinned
  int* go_dev = nullptr;  // the same word as the device sees it
  Timing() {
    cuda_check(cudaEventCreate(&start), "cudaEventCreate");
    cuda_check(cudaEventCreate(&stop), "cudaEventCreate");
    cuda_check(cudaHostAlloc(&go, sizeof(int), cudaHostAllocMapped), "cudaHostAlloc");
    cuda_check(cudaHostGetDevicePointer(&go_dev, go, 0), "cudaHostGetDevicePointer");
  }
};

}  // namespace

void cuda_check(cudaError_t e, const char* what) {
  if (e == cudaSuccess) return;
  const std::string found = std::string(cudaGetErrorName(e)) + ": " + cudaGetErrorString(e);
  if (is_fault(e)) {
    g_lost = true;
    throw CudaFault(what, found);
  }
  cudaGetLastError();  // a refused launch or call leaves nothing behind
  throw Error(ExitCode::check_failed, what, "CUDA", "", found);
}

const CudaDevice& cuda_device() {
  static const CudaDevice device = look_up();
  return device;
}
bool cuda_usable() { return cuda_device().mode == CudaMode::device; }
int64_t cuda_free_bytes() {
  size_t free = 0, total = 0;
  if (!cuda_usable() || cudaMemGetInfo(&free, &total) != cudaSuccess) return 0;
  return static_cast<int64_t>(free);
}
bool cuda_lost() { return g_lost; }

CudaStream cuda_stream() {
  if (!cuda_usable()) throw Error(ExitCode::nothing_ran, cuda_device().reason, "CUDA");
  static const CudaStream stream = [] {
    cudaStream_t s = nullptr;
    cuda_check(cudaStreamCreateWithFlags(&s, cudaStreamNonBlocking), "cudaStreamCreate");
    return s;
  }();
  return stream;
}
void cuda_synchronize(CudaStream stream) {
  wait_for([&] { return cudaStreamQuery(stream); }, "kernels on the stream");
}

DeviceBuffer::DeviceBuffer(int64_t bytes) : bytes_(bytes) {
  if (bytes == 0) return;
  const cudaError_t e = cudaMalloc(&data_, static_cast<size_t>(bytes));
  if (e == cudaErrorMemoryAllocation) {
    data_ = nullptr;
    cudaGetLastError();
    throw CudaOutOfMemory(bytes);
  }
  cuda_check(e, "cudaMalloc");
}
DeviceBuffer::~DeviceBuffer() {
  if (data_ != nullptr && !g_lost) cudaFree(data_);  // it would wait for a kernel that hangs
}

void cuda_upload(void* device, const void* host, int64_t bytes, CudaStream stream) {
  cuda_check(
      cudaMemcpyAsync(device, host, static_cast<size_t>(bytes), cudaMemcpyHostToDevice, stream),
      "upload");
  cuda_check(cudaStreamSynchronize(stream), "upload");
}
void cuda_download(void* host, const void* device, int64_t bytes, CudaStream stream) {
  cuda_check(
      cudaMemcpyAsync(host, device, static_cast<size_t>(bytes), cudaMemcpyDeviceToHost, stream),
      "download");
  cuda_check(cudaStreamSynchronize(stream), "download");
}
void cuda_copy(void* to, const void* from, int64_t bytes, CudaStream stream) {
  cuda_check(
      cudaMemcpyAsync(to, from, static_cast<size_t>(bytes), cudaMemcpyDeviceToDevice, stream),
      "device copy");
}
void cuda_fill(void* device, int byte, int64_t bytes, CudaStream stream) {
  cuda_check(cudaMemsetAsync(device, byte, static_cast<size_t>(bytes), stream), "device fill");
}

double cuda_seconds(CudaStream stream, void (*enqueue)(void*), void* context) {
  static Timing t;
  *static_cast<volatile int*>(t.go) = 0;
  hold<<<1, 1, 0, stream>>>(t.go_dev);
  cuda_check(cudaEventRecord(t.start, stream), "cudaEventRecord");
  try {
    enqueue(context);
  } catch (...) {
    *static_cast<volatile int*>(t.go) = 1;
    throw;
  }
  cuda_check(cudaEventRecord(t.stop, stream), "cudaEventRecord");
  *static_cast<volatile int*>(t.go) = 1;
  wait_for([&] { return cudaEventQuery(t.stop); }, "kernels between two events");
  float ms = 0;
  cuda_check(cudaEventElapsedTime(&ms, t.start, t.stop), "cudaEventElapsedTime");
  return 1e-3 * static_cast<double>(ms);
}

struct CudaGraph::State {
  cudaGraphExec_t exec = nullptr;
  ~State() {
    if (exec != nullptr) cudaGraphExecDestroy(exec);
  }
};
CudaGraph::CudaGraph() = default;
CudaGraph::~CudaGraph() = default;
CudaGraph::CudaGraph(CudaGraph&&) noexcept = default;
CudaGraph& CudaGraph::operator=(CudaGraph&&) noexcept = default;
bool CudaGraph::ready() const { return state_ != nullptr && state_->exec != nullptr; }
void CudaGraph::begin(CudaStream stream) {
  state_ = std::make_unique<State>();
  cuda_check(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal),
             "cudaStreamBeginCapture");
}
void CudaGraph::end(CudaStream stream) {
  cudaGraph_t graph = nullptr;
  cuda_check(cudaStreamEndCapture(stream, &graph), "cudaStreamEndCapture");
  const cudaError_t e = cudaGraphInstantiate(&state_->exec, graph, 0);
  cudaGraphDestroy(graph);
  cuda_check(e, "cudaGraphInstantiate");
}
void CudaGraph::launch(CudaStream stream) {
  cuda_check(cudaGraphLaunch(state_->exec, stream), "cudaGraphLaunch");
}

NvtxRange::NvtxRange(const char* name) { nvtxRangePushA(name); }
NvtxRange::~NvtxRange() { nvtxRangePop(); }

}  // namespace v3b::kern
