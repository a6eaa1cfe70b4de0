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
  std::string brand;
  int64_t l1d_bytes = 0, l2_bytes = 0, l3_bytes = 0;  // per instance as sysfs tells; 0 unknown
};
const CpuFeatures&
cpu_features();  // V3BENCH_MAX_ISA=avx2|avx512|avx512_bf16 caps it (tests of lower levels)

int num_threads();            // OpenMP's current maximum
void set_num_threads(int n);  // <= 0: all logical processors that this process may use

}  // namespace v3b::kern
