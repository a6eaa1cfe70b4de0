#include "reports/row.h"

namespace v3b::rep {

const std::vector<std::string>& bench_columns() {
  static const std::vector<std::string> columns =
      with_identity({"op",          "impl",         "resolved_isa",  "case",
                     "params",      "dtype",        "status",        "reason",
                     "max_abs_err", "max_rel_err",  "rel_fro_err",   "err_over_bound",
                     "worst_index", "route_flips",  "cache_state",   "samples",
                     "stop_reason", "min_us",       "q1_us",         "median_us",
                     "q3_us",       "stdrel_pct",   "flop",          "bytes",
                     "gflop_s",     "gb_s",         "roof",          "pct_of_roof",
                     "repro",       "sm_clock_mhz", "mem_clock_mhz", "gpu_temperature_c",
                     "gpu_power_w", "throttle",     "energy_mj",     "peer"});
  return columns;
}

const std::vector<std::string>& bench_key_columns() {
  static const std::vector<std::string> columns = {"op",    "impl",        "case",
                                                   "dtype", "cache_state", "device"};
  return columns;
}

Record Row::record(const Identity& id) const {
  Record r;
  r.set(id);
  r.set("op", op).set("impl", impl).set("resolved_isa", resolved_isa).set("case", case_text);
  r.set("params", params).set("dtype", dtype).set("status", status).set("reason", reason);
  r.set("max_abs_err", max_abs_err).set("max_rel_err", max_rel_err).set("rel_fro_err", rel_fro_err);
  r.set("err_over_bound", err_over_bound)
      .set("worst_index", worst_index)
      .set("route_flips", route_flips);
  r.set("cache_state", cache_state).set("samples", samples).set("stop_reason", stop_reason);
  r.set("min_us", min_us).set("q1_us", q1_us).set("median_us", median_us).set("q3_us", q3_us);
  r.set("stdrel_pct", stdrel_pct).set("flop", flop).set("bytes", bytes).set("gflop_s", gflop_s);
  r.set("gb_s", gb_s).set("roof", roof).set("pct_of_roof", pct_of_roof).set("repro", repro);
  r.set("sm_clock_mhz", sm_clock_mhz).set("mem_clock_mhz", mem_clock_mhz);
  r.set("gpu_temperature_c", gpu_temperature_c).set("gpu_power_w", gpu_power_w);
  r.set("throttle", throttle).set("energy_mj", energy_mj).set("peer", peer);
  return r;
}

std::vector<BenchRow> read_bench_csv(const std::string& path, std::vector<std::string>* warnings) {
  std::vector<std::string> required = bench_key_columns();
  for (const char* c : {"machine", "status", "q1_us", "median_us", "q3_us"})
    required.emplace_back(c);
  const CsvTable t = read_csv(path, {.required = required, .known = bench_columns()});
  if (warnings != nullptr) *warnings = t.warnings;
  std::vector<BenchRow> rows;
  for (size_t i = 0; i < t.rows.size(); ++i) {
    BenchRow b;
    b.machine = t.cell(i, "machine");
    b.device = t.cell(i, "device");
    Row& r = b.row;
    const auto integer = [&](const char* c) -> std::optional<int64_t> {
      const auto v = t.number(i, c);
      return v ? std::optional<int64_t>(static_cast<int64_t>(*v)) : std::nullopt;
    };
    r.op = t.cell(i, "op");
    r.impl = t.cell(i, "impl");
    r.resolved_isa = t.cell(i, "resolved_isa");
    r.case_text = t.cell(i, "case");
    r.params = t.cell(i, "params");
    r.dtype = t.cell(i, "dtype");
    r.status = t.cell(i, "status");
    r.reason = t.cell(i, "reason");
    r.max_abs_err = t.number(i, "max_abs_err");
    r.max_rel_err = t.number(i, "max_rel_err");
    r.rel_fro_err = t.number(i, "rel_fro_err");
    r.err_over_bound = t.number(i, "err_over_bound");
    r.worst_index = t.cell(i, "worst_index");
    r.route_flips = integer("route_flips");
    r.cache_state = t.cell(i, "cache_state");
    r.samples = integer("samples");
    r.stop_reason = t.cell(i, "stop_reason");
    r.min_us = t.number(i, "min_us");
    r.q1_us = t.number(i, "q1_us");
    r.median_us = t.number(i, "median_us");
    r.q3_us = t.number(i, "q3_us");
    r.stdrel_pct = t.number(i, "stdrel_pct");
    r.flop = t.number(i, "flop");
    r.bytes = t.number(i, "bytes");
    r.gflop_s = t.number(i, "gflop_s");
    r.gb_s = t.number(i, "gb_s");
    r.roof = t.cell(i, "roof");
    r.pct_of_roof = t.number(i, "pct_of_roof");
    r.repro = t.cell(i, "repro");
    r.sm_clock_mhz = t.number(i, "sm_clock_mhz");
    r.mem_clock_mhz = t.number(i, "mem_clock_mhz");
    r.gpu_temperature_c = t.number(i, "gpu_temperature_c");
    r.gpu_power_w = t.number(i, "gpu_power_w");
    r.throttle = t.cell(i, "throttle");
    r.energy_mj = t.number(i, "energy_mj");
    r.peer = integer("peer");
    rows.push_back(std::move(b));
  }
  return rows;
}

}  // namespace v3b::rep
