// Times implementations that passed: Google Benchmark with manual time, all implementations of a
// case interleaved, caches as the case says, every sample kept, outputs judged again after each
// round (laws 6, 9, 10).
#pragma once
#include <memory>
#include <string>
#include <vector>

#include "bench/harness/check.h"
#include "bench/harness/nvml.h"
#include "bench/harness/op.h"

namespace v3b::bench {

struct TimeOptions {
  double job_seconds = 0.2;  // wall time for the samples of one job, over all rounds
  int rounds = 5;            // repetitions; implementations take turns
  uint64_t seed = 1;
  std::vector<std::string>
      benchmark_args;           // --benchmark_...: passed on, stronger than the two above
  double energy_seconds = 0.3;  // of back-to-back runs of a CUDA job whose energy NVML can give
  std::function<void(const std::string& how)> on_job;  // told before each round of one
};

struct TimeResult {
  std::string how;
  std::vector<double> samples_us;
  std::string stop_reason;   // budget | slow (one run is longer than the budget) | min_time (the
                             // user's flag) | error
  std::string failure;       // the outputs of the timed buffers were wrong
  std::string error;         // the run threw
  bool device_lost = false;  // ... a CUDA fault; the other CUDA jobs of the group have no samples
  GpuLoad load;              // CUDA only
};

struct SampleStats {
  int64_t count = 0;
  double min = 0, q1 = 0, median = 0, q3 = 0, stdrel_pct = 0;
};
SampleStats summarize(std::vector<double> samples);

class Timer {
 public:
  // Takes the --benchmark_* flags; throws Error(usage) for one that Google Benchmark does not know.
  // One Timer a process.
  explicit Timer(const TimeOptions& options);
  ~Timer();

  // The implementations passed `checker` and are of one device. Order of results is that of `hows`. Cold inputs rotate
  // past that device's last-level cache. Throws CudaOutOfMemory when not even one copy fits.
  std::vector<TimeResult> time_group(const OpBase& op, const CaseInfo& info,
                                     const std::vector<std::string>& hows,
                                     const CaseChecker& checker);

 private:
  struct Reporters;
  TimeOptions options_;
  bool user_min_time_ = false, user_repetitions_ = false;
  std::unique_ptr<Reporters> reporters_;
};

}  // namespace v3b::bench
