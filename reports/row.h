// A row of bench.csv: one implementation of one op on one case (DESIGN 5).
#pragma once
#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "reports/csv.h"

namespace v3b::rep {

// status: passed | failed | unsupported | not_built | no_device | suspect | error
struct Row {
  std::string op, impl, resolved_isa, case_text, params, dtype;
  std::string status, reason;
  std::optional<double> max_abs_err, max_rel_err, rel_fro_err, err_over_bound;
  std::string worst_index;  // "y[12]"
  std::optional<int64_t> route_flips;
  std::string cache_state;  // hot | cold
  std::optional<int64_t> samples;
  std::string stop_reason;
  std::optional<double> min_us, q1_us, median_us, q3_us, stdrel_pct;
  std::optional<double> flop, bytes, gflop_s, gb_s;
  std::string roof;  // what binds: read | copy | read+copy | f32 | bf16 | ...
  std::optional<double> pct_of_roof;
  std::string repro;
  // Of a timed CUDA job, as NVML gives them; blank elsewhere.
  std::optional<double> sm_clock_mhz, mem_clock_mhz, gpu_temperature_c, gpu_power_w;
  std::string throttle;             // none | reasons joined by +
  std::optional<double> energy_mj;  // of one run
  std::optional<int64_t>
      peer;  // 1: a library or the plain form that ours is compared with; 0: ours

  bool timed() const { return median_us.has_value(); }
  Record record(const Identity& id) const;
};

// stop_reason of a row whose job took the device or the process with it: --resume does not run it again.
inline constexpr const char* kFaulted = "fault";

const std::vector<std::string>& bench_columns();      // identity included, in file order
const std::vector<std::string>& bench_key_columns();  // what --resume and compare pair rows by

struct BenchRow {  // a row read back
  std::string machine, device;
  Row row;
};
std::vector<BenchRow> read_bench_csv(const std::string& path,
                                     std::vector<std::string>* warnings = nullptr);

}  // namespace v3b::rep
