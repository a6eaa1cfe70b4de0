// What this CPU can do, read at run time (cpuid and, for AMX, permission from the kernel), and threads.
#pragma once
#include <cstdint>
#include <string>

namespace v3b::kern {

struct CpuFeatures {
  bool avx2 = false, fma = false, f16c = false;
  bool avx512 = false;  // F, BW, DQ, VL, CD
  bool avx512_bf16 = false, avx512_vnni = false, avx512_fp16 = false;
  bool amx_tile = false, amx_bf16 = false, amx_int8 = false;  // and the kernel granted tile state
  bool amx_emulated =
      false;  // amx_bf16 is the emulation of kernels/core/amx.h (V3BENCH_AMX=emulate)
  std::string brand;
  int64_t l1d_bytes = 0, l2_bytes = 0, l3_bytes = 0;  // per instance as sysfs tells; 0 unknown
};
// V3BENCH_MAX_ISA=avx2|avx512|avx512_bf16 caps it for the process, IsaCap for a scope: ask at every call, keep no copy.
const CpuFeatures& cpu_features();

// The levels that kernels are written for, in order; each holds what those before it hold.
enum class Isa { avx2, avx512, avx512_bf16, amx };
const char* isa_name(Isa level);  // "avx2", ..., "amx"
Isa best_isa();                   // of cpu_features()

// Until it ends, cpu_features() and Highway's dispatch show no level above `most` (oneDNN is not reached: it decides
// once a process). For whole kernels: none may run while one begins or ends. Scopes may nest.
class IsaCap {
 public:
  explicit IsaCap(Isa most);
  ~IsaCap();
  IsaCap(const IsaCap&) = delete;
  IsaCap& operator=(const IsaCap&) = delete;

 private:
  const CpuFeatures* before_;
  int64_t targets_before_;
};

int num_threads();            // OpenMP's current maximum
void set_num_threads(int n);  // <= 0: all logical processors that this process may use

}  // namespace v3b::kern
