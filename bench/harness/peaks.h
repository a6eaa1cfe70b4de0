// What this machine can do in these minutes (law 8): memory bandwidth and arithmetic rates with all
// threads. Each probe takes some milliseconds, so they run before and after every group of timed
// jobs.
#pragma once
#include <cstdint>
#include <map>
#include <string>

namespace v3b::bench {

// Keys of the CPU: read_gb_s, copy_gb_s (read + written), write_gb_s (stores past the caches, nothing read), f32_gflop_s, f64_gflop_s, bf16_gflop_s, int8_gop_s
// (only where an instruction exists). Of the GPU: gpu_read_gb_s, gpu_copy_gb_s, gpu_f32_gflop_s, gpu_bf16_gflop_s,
// gpu_fp8_gflop_s. Values are the best of the passes made.
using Peaks = std::map<std::string, double>;

// which: "read", "copy", "write", "f32", "f64", "bf16", "int8"; "gpu_read", "gpu_copy", "gpu_f32", "gpu_bf16", "gpu_fp8".
// Unknown to this machine: nothing is added.
void probe_peak(const std::string& which, Peaks& peaks, int passes = 1);
Peaks probe_all_peaks(int passes = 3);  // the GPU's too, where there is one

// "avx512_bf16", "amx_bf16", "f32" (bf16 converted: the roof is the f32 rate), ... of the compute
// roof.
std::string roof_instruction(const std::string& which);

// The peak behind a roof name in units of 1/s (bytes or operations); 0 when not measured. bf16
// without bf16 instructions falls back to f32, gpu_fp8 without such instructions to gpu_bf16.
double roof_rate(const Peaks& peaks, const std::string& which);

// Reads a buffer of twice the last-level cache, so that what was in the caches is gone.
void scrub_caches();

int64_t last_level_cache_bytes();

}  // namespace v3b::bench
