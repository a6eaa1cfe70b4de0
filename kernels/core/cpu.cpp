// cpuid for the features, XGETBV for what the kernel saves, arch_prctl for AMX tiles, sysfs for
// caches.
#include "kernels/core/cpu.h"

#include <cpuid.h>
#include <hwy/targets.h>
#include <omp.h>
#include <sched.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <dnnl.hpp>
#include <fstream>

#include "model/error.h"

namespace v3b::kern {
namespace {

constexpr int kXfeatureTileData = 18;
constexpr int kArchReqXcompPerm = 0x1023;

uint64_t xgetbv0() {
  uint32_t lo = 0, hi = 0;
  __asm__ volatile("xgetbv" : "=a"(lo), "=d"(hi) : "c"(0));
  return (static_cast<uint64_t>(hi) << 32) | lo;
}

bool bit(uint32_t reg, int n) { return ((reg >> n) & 1u) != 0; }

std::string brand_string() {
  uint32_t r[12] = {};
  if (__get_cpuid_max(0x80000000u, nullptr) < 0x80000004u) return "unknown";
  for (uint32_t i = 0; i < 3; ++i) {
    __get_cpuid(0x80000002u + i, &r[4 * i], &r[4 * i + 1], &r[4 * i + 2], &r[4 * i + 3]);
  }
  char text[49] = {};
  std::memcpy(text, r, 48);
  std::string s(text);
  while (!s.empty() && (s.back() == ' ' || s.back() == '\0')) s.pop_back();
  const size_t first = s.find_first_not_of(' ');
  return first == std::string::npos ? "unknown" : s.substr(first);
}

// "32K", "1024K", "32M" as sysfs writes them; 0 when the file is missing.
int64_t read_size(const std::string& path) {
  std::ifstream in(path);
  int64_t n = 0;
  char unit = 0;
  if (!(in >> n)) return 0;
  in >> unit;
  return unit == 'K' ? n << 10 : unit == 'M' ? n << 20 : unit == 'G' ? n << 30 : n;
}

void read_caches(CpuFeatures& f) {
  for (int i = 0; i < 8; ++i) {
    const std::string dir = "/sys/devices/system/cpu/cpu0/cache/index" + std::to_string(i) + "/";
    std::ifstream level_in(dir + "level"), type_in(dir + "type");
    int level = 0;
    std::string type;
    if (!(level_in >> level) || !(type_in >> type)) continue;
    const int64_t bytes = read_size(dir + "size");
    if (level == 1 && type != "Instruction") f.l1d_bytes = bytes;
    if (level == 2) f.l2_bytes = bytes;
    if (level == 3) f.l3_bytes = bytes;
  }
}

// oneDNN and Highway dispatch by themselves; the cap has to reach them before their first use.
void cap_libraries(dnnl::cpu_isa isa, int64_t first_allowed_target) {
  dnnl::set_max_cpu_isa(isa);
  hwy::DisableTargets(first_allowed_target - 1);  // better targets have lower bits
}

// Drops what lies above a level.
void drop_above(CpuFeatures& f, Isa most) {
  if (most < Isa::amx)
    f.amx_tile = f.amx_bf16 = f.amx_int8 = f.amx_emulated = f.avx512_fp16 = false;
  if (most < Isa::avx512_bf16) f.avx512_bf16 = false;
  if (most < Isa::avx512) f.avx512 = f.avx512_vnni = false;
}

void apply_cap(CpuFeatures& f) {
  const char* cap = std::getenv("V3BENCH_MAX_ISA");
  if (cap == nullptr || *cap == '\0') return;
  const std::string s(cap);
  if (s != "avx2" && s != "avx512" && s != "avx512_bf16" && s != "amx") {
    throw Error(ExitCode::usage, "unknown instruction set", "environment variable V3BENCH_MAX_ISA",
                "avx2, avx512, avx512_bf16 or amx", s);
  }
  if (s == "amx") return;
  if (s == "avx512_bf16") {
    drop_above(f, Isa::avx512_bf16);
    return cap_libraries(dnnl::cpu_isa::avx512_core_bf16, HWY_AVX3_DL);
  }
  if (s == "avx512") {
    drop_above(f, Isa::avx512);
    return cap_libraries(
        f.avx512_vnni ? dnnl::cpu_isa::avx512_core_vnni : dnnl::cpu_isa::avx512_core, HWY_AVX3);
  }
  drop_above(f, Isa::avx2);
  cap_libraries(dnnl::cpu_isa::avx2, HWY_AVX2);
}

void apply_emulation(CpuFeatures& f) {
  const char* text = std::getenv("V3BENCH_AMX");
  if (text == nullptr || *text == '\0') return;
  if (std::string(text) != "emulate")
    throw Error(ExitCode::usage, "unknown value", "environment variable V3BENCH_AMX", "emulate",
                text);
  if (!f.avx512_bf16)
    throw Error(ExitCode::usage, "the AMX emulation needs AVX512_BF16",
                "environment variable V3BENCH_AMX");
  f.amx_bf16 = f.amx_emulated = true;
}

CpuFeatures detect() {
  CpuFeatures f;
  f.brand = brand_string();
  read_caches(f);
  uint32_t a = 0, b = 0, c = 0, d = 0;
  uint64_t xcr0 = 0;
  if (__get_cpuid(1, &a, &b, &c, &d) != 0) {
    if (bit(c, 27)) xcr0 = xgetbv0();
    const bool ymm = (xcr0 & 0x6u) == 0x6u;
    f.fma = bit(c, 12) && ymm;
    f.f16c = bit(c, 29) && ymm;
  }
  if (__get_cpuid_count(7, 0, &a, &b, &c, &d) != 0) {
    const bool ymm = (xcr0 & 0x6u) == 0x6u, zmm = (xcr0 & 0xe6u) == 0xe6u;
    f.avx2 = bit(b, 5) && ymm;
    f.avx512 = zmm && bit(b, 16) && bit(b, 17) && bit(b, 28) && bit(b, 30) && bit(b, 31);
    f.avx512_vnni = f.avx512 && bit(c, 11);
    f.avx512_fp16 = f.avx512 && bit(d, 23);
    const bool tiles = (xcr0 & 0x60000u) == 0x60000u && bit(d, 24);
    f.amx_tile = tiles && syscall(SYS_arch_prctl, kArchReqXcompPerm, kXfeatureTileData) == 0;
    f.amx_bf16 = f.amx_tile && bit(d, 22);
    f.amx_int8 = f.amx_tile && bit(d, 25);
    if (a >= 1 && __get_cpuid_count(7, 1, &a, &b, &c, &d) != 0) {
      f.avx512_bf16 = f.avx512 && bit(a, 5);
    }
  }
  apply_emulation(f);
  apply_cap(f);
  return f;
}

// Highway kernels may run before anybody asks for the features; the cap must hold for them too. A
// wrong value is reported when cpu_features() is called, where somebody can catch it.
const bool kCapApplied = [] {
  try {
    return std::getenv("V3BENCH_MAX_ISA") != nullptr && cpu_features().avx2;
  } catch (const Error&) {
    return false;
  }
}();

}  // namespace

namespace {
const CpuFeatures& detected() {
  static const CpuFeatures features = detect();
  return features;
}
std::atomic<const CpuFeatures*> capped{nullptr};  // null: all that was detected

// The features of each level, computed once.
const CpuFeatures& features_up_to(Isa most) {
  static const std::array<CpuFeatures, 4> levels = [] {
    std::array<CpuFeatures, 4> out;
    for (size_t i = 0; i < out.size(); ++i) {
      out[i] = detected();
      drop_above(out[i], static_cast<Isa>(i));
    }
    return out;
  }();
  return levels[static_cast<size_t>(most)];
}

// Read once: each query of Highway asks CPUID, which a virtual machine answers in microseconds.
int64_t all_targets() {
  static const int64_t targets = (detected(), hwy::SupportedTargets());
  return targets;
}
int64_t highway_targets = 0;  // what a cap has left; 0: all
}  // namespace

const CpuFeatures& cpu_features() {
  const CpuFeatures* c = capped.load(std::memory_order_acquire);
  return c != nullptr ? *c : detected();
}

const char* isa_name(Isa level) {
  switch (level) {
    case Isa::avx2:
      return "avx2";
    case Isa::avx512:
      return "avx512";
    case Isa::avx512_bf16:
      return "avx512_bf16";
    case Isa::amx:
      return "amx";
  }
  return "?";
}

Isa best_isa() {
  const CpuFeatures& f = cpu_features();
  return f.amx_bf16 && f.avx512_bf16 ? Isa::amx
         : f.avx512_bf16             ? Isa::avx512_bf16
         : f.avx512                  ? Isa::avx512
                                     : Isa::avx2;
}

IsaCap::IsaCap(Isa most) : before_(capped.load()), targets_before_(highway_targets) {
  const Isa level = std::min(most, best_isa());
  capped.store(&features_up_to(level), std::memory_order_release);
  const int64_t best = level == Isa::avx2     ? HWY_AVX2
                       : level == Isa::avx512 ? HWY_AVX3
                                              : HWY_AVX3_DL;
  highway_targets = all_targets() & ~(best - 1);  // better targets have lower bits
  hwy::GetChosenTarget().Update(highway_targets);
}

IsaCap::~IsaCap() {
  capped.store(before_, std::memory_order_release);
  highway_targets = targets_before_;
  hwy::GetChosenTarget().Update(highway_targets != 0 ? highway_targets : all_targets());
}

int num_threads() { return omp_in_parallel() != 0 ? 1 : omp_get_max_threads(); }

void set_num_threads(int n) {
  if (n <= 0) {
    cpu_set_t set;
    CPU_ZERO(&set);
    n = sched_getaffinity(0, sizeof set, &set) == 0 ? CPU_COUNT(&set) : omp_get_num_procs();
  }
  omp_set_num_threads(n < 1 ? 1 : n);
}

}  // namespace v3b::kern
