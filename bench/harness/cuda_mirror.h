// CUDA implementations in an op's declaration. The op's host tensors are mirrored on the device with guard bands;
// prepare() uploads, run() launches and waits, timed_run() measures by events, fetch() downloads the outputs.
//
//   v.push_back(cuda_impl<RmsNorm>("cuda_simt", nullptr, [](Data& d, CudaMirror& m) {
//     auto a = d.args();
//     m.map(a.x, a.residual, a.w, a.y);       // host pointers into the op's tensors -> device pointers
//     return [a](kern::CudaStream s) { kern::rmsnorm_cuda_simt(a, s); };
//   }));
#pragma once
#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "bench/harness/op.h"
#include "kernels/core/cuda.h"

namespace v3b::bench {

class CudaMirror {
 public:
  explicit CudaMirror(std::vector<HostTensor*> tensors);
  // Pointers into (or just past) a mirrored host tensor become device pointers; null stays null. Anything else throws.
  template <class... P>
  void map(P&... pointers) {
    (map_one(pointers), ...);
  }
  const void* device_of(const void* host) const;
  // Device memory that lives as long as the runner: scratch, packed weights.
  void* scratch(int64_t bytes);
  // Device copy of a host array (pointer tables and the like).
  void* upload(const void* host, int64_t bytes);
  void poison_outputs();  // NaN bytes, as the host's
  void fetch();  // outputs and inouts to the host; throws Error when a guard band was written

 private:
  struct Copy {
    HostTensor* tensor;
    kern::DeviceBuffer buffer;  // guard | data | guard
  };
  template <class T>
  void map_one(T*& p) {
    p = static_cast<T*>(const_cast<void*>(device_of(p)));
  }
  std::vector<Copy> copies_;
  std::vector<kern::DeviceBuffer> extra_;
};

// Why a CUDA job cannot run here (law 7). min_cc: 80, or 89/90 for what needs it; hardware_only: library code and
// kernels that the emulation cannot run.
Support cuda_support(int min_cc = 80, bool hardware_only = false);
// The emulation does some tenths of a GFLOP/s: cases of more than `most` are for hardware. `yes` on a device.
Support cuda_emulation_limit(double flop, double most = 6e8);
std::string cuda_isa();  // "sm_90", or "emulated"
Runner cuda_runner(std::shared_ptr<CudaMirror> mirror, std::function<void(kern::CudaStream)> launch,
                   const std::string& name);

template <class Op>
using CudaPrepare =
    std::function<std::function<void(kern::CudaStream)>(typename Op::Data&, CudaMirror&)>;

// `shapes`: what the kernel itself cannot do, or null. baseline: a library.
template <class Op>
Impl<Op> cuda_impl(const std::string& how, std::function<Support(const typename Op::Shape&)> shapes,
                   CudaPrepare<Op> prepare, bool baseline = false, int min_cc = 80,
                   bool hardware_only = false) {
  Impl<Op> i;
  i.how = how;
  i.baseline = baseline;
  i.support = [shapes, min_cc, hardware_only](const typename Op::Shape& s) {
    Support base = cuda_support(min_cc, hardware_only);
    if (base.state == Support::State::yes && shapes) base = shapes(s);
    return base;
  };
  i.prepare = [prepare, name = std::string(Op::name) + "." + how](typename Op::Data& d) {
    auto mirror = std::make_shared<CudaMirror>(d.tensors());
    auto launch = prepare(d, *mirror);
    return cuda_runner(std::move(mirror), std::move(launch), name);
  };
  return i;
}

}  // namespace v3b::bench
