// The CUDA runtime as the rest of the program sees it: plain C++, no CUDA headers. Three builds stand behind it:
//   nvcc build with a GPU           CudaMode::device
//   nvcc build, no GPU or driver    CudaMode::no_device (reason says why)
//   build without nvcc              CudaMode::not_built; with V3BENCH_CUDA=emulate: CudaMode::emulated
// Emulated: the same .cu sources, compiled as C++, run thread by thread on the host (cuda_emulation.h). It proves
// index arithmetic, barriers, rounding and packing; its time means nothing and it is never "run on hardware".
#pragma once
#include <cstdint>
#include <memory>
#include <string>
#include <type_traits>

struct CUstream_st;

namespace v3b::kern {

using CudaStream = CUstream_st*;

enum class CudaMode { not_built, no_device, emulated, device };

struct CudaDevice {
  CudaMode mode = CudaMode::not_built;
  std::string
      reason;  // one line, unless mode is device: "no NVIDIA driver", "driver 12.2 is older than ..."
  std::string name;
  int cc = 0;  // compute capability: 80, 90, 100; emulated: 90
  int sms = 0;
  int64_t memory_bytes = 0, l2_bytes = 0,
          shared_bytes = 0;     // shared: largest of one block (opt-in)
  std::string driver, runtime;  // versions
  std::string pci_bus_id;       // by which NVML finds the same device
};
const CudaDevice& cuda_device();  // looked up once; never throws
// Devices that can run jobs: device and emulated.
bool cuda_usable();
// Device memory that an allocation could still get; 0 where there is no device (emulated: all of the host's).
int64_t cuda_free_bytes();
// A kernel faulted or never ended (CudaFault was thrown): nothing works on the device any more in this process.
bool cuda_lost();

// The one stream on which everything runs. Throws v3b::Error where !cuda_usable().
CudaStream cuda_stream();
// Waits for the stream; throws CudaFault (cuda_error.h) with the CUDA error's name if a kernel faulted or does not end
// within a minute.
void cuda_synchronize(CudaStream stream);

// Device memory, 256-byte aligned. Throws CudaOutOfMemory.
class DeviceBuffer {
 public:
  DeviceBuffer() = default;
  explicit DeviceBuffer(int64_t bytes);
  ~DeviceBuffer();
  DeviceBuffer(DeviceBuffer&& o) noexcept : data_(o.data_), bytes_(o.bytes_) {
    o.data_ = nullptr;
    o.bytes_ = 0;
  }
  DeviceBuffer& operator=(DeviceBuffer&& o) noexcept;
  void* data() const { return data_; }
  template <class T>
  T* as() const {
    return static_cast<T*>(data_);
  }
  int64_t bytes() const { return bytes_; }
  // At least `bytes`; contents are lost when it grows.
  void* reserve(int64_t bytes);

 private:
  void* data_ = nullptr;
  int64_t bytes_ = 0;
};

// In stream order; the host side of the first two is done when they return.
void cuda_upload(void* device, const void* host, int64_t bytes, CudaStream stream);
void cuda_download(void* host, const void* device, int64_t bytes, CudaStream stream);
void cuda_copy(void* device_to, const void* device_from, int64_t bytes, CudaStream stream);
void cuda_fill(void* device, int byte, int64_t bytes, CudaStream stream);

// Seconds that what `enqueue` puts on the stream takes on the device, between two events. A kernel that spins on a
// host flag keeps the device busy until everything is enqueued, so that launch latency is not part of it (as long as
// `enqueue` fits the launch queue and does not synchronize).
double cuda_seconds(CudaStream stream, void (*enqueue)(void*), void* context);
template <class F>
double cuda_seconds(CudaStream stream, F&& enqueue) {
  return cuda_seconds(
      stream, [](void* f) { (*static_cast<std::remove_reference_t<F>*>(f))(); },
      const_cast<void*>(static_cast<const void*>(&enqueue)));
}

// A captured sequence of launches and copies on cuda_stream(), replayed as one.
class CudaGraph {
 public:
  CudaGraph();
  ~CudaGraph();
  CudaGraph(CudaGraph&&) noexcept;
  CudaGraph& operator=(CudaGraph&&) noexcept;
  bool ready() const;
  void begin(CudaStream stream);  // capture: what follows is recorded, not run
  void end(CudaStream stream);
  void launch(CudaStream stream);

 private:
  struct State;
  std::unique_ptr<State> state_;
};

// NVTX range with the implementation's name (nothing without a profiler, nothing in emulation).
class NvtxRange {
 public:
  explicit NvtxRange(const char* name);
  ~NvtxRange();
  NvtxRange(const NvtxRange&) = delete;
  NvtxRange& operator=(const NvtxRange&) = delete;
};

}  // namespace v3b::kern
