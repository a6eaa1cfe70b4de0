// Part (c): the measured time of one expert layer on routes of chosen imbalance, through the
// harness (checked in the same process before it is timed).
#include <fmt/format.h>

#include <algorithm>
#include <charconv>
#include <map>

#include "bench/harness/jobs.h"
#include "bench/harness/run.h"
#include "bench/harness/shape_io.h"
#include "bench/ops/registry.h"
#include "model/error.h"
#include "scenarios/device.h"
#include "scenarios/expert_load_rows.h"

namespace v3b::scen {
namespace {

constexpr const char* kOp = "moe_experts";

// Layer of V2-Lite's experts; --quick takes half of its widths and a quarter of its experts (67 MB
// of weights, more than the caches hold, and few enough for the float64 reference).
struct Layer {
  int64_t d, m, E, K, shared_m;
  std::string name() const { return fmt::format("d {}, m {}, E {}, K {}", d, m, E, K); }
};
Layer layer_of(bool full) {
  return full ? Layer{2048, 1408, 64, 6, 2816} : Layer{1024, 704, 16, 4, 704};
}

// "uniform", "zipf-S", "hot-N", "ratio-R" -> the op's keys.
std::string route_keys(const std::string& name) {
  if (name == "uniform") return "";
  for (const char* kind : {"zipf", "hot", "ratio"}) {
    const std::string prefix = std::string(kind) + "-";
    if (name.rfind(prefix, 0) != 0) continue;
    const std::string value = name.substr(prefix.size());
    double v = 0;
    const auto r = std::from_chars(value.data(), value.data() + value.size(), v);
    if (r.ec == std::errc() && r.ptr == value.data() + value.size() && v > 0)
      return fmt::format(",{}={}", kind, value);
  }
  throw Error(ExitCode::usage, "unknown routes", "--routes",
              "uniform, zipf-S, hot-N or ratio-R with a positive number", "'" + name + "'");
}

const bench::OpBase& find_op(const bench::Ops& ops) {
  for (const auto& op : ops)
    if (op->name() == kOp) return *op;
  throw Error(ExitCode::usage, "no such op", "expert-load", kOp);
}

// The load that the op's routes put on each expert. Routes depend on T, E, K and the imbalance
// alone, so a layer of width one draws the same.
std::vector<int64_t> route_load(const bench::OpBase& op, int64_t T, const Layer& l,
                                const std::string& keys, uint64_t seed) {
  const auto data = op.make(fmt::format("T={},d=1,m=1,E={},K={},shared_m=0{}", T, l.E, l.K, keys),
                            bench::Fill::real, seed);
  std::vector<int64_t> load(static_cast<size_t>(l.E));
  for (const auto* t : data.tensors)
    if (t->name() == "idx") {
      const auto* idx = static_cast<const int32_t*>(t->data());
      for (int64_t i = 0; i < t->numel(); ++i) ++load.at(static_cast<size_t>(idx[i]));
      return load;
    }
  throw Error(ExitCode::usage, "op has no routes", kOp, "a tensor idx");
}

struct Wanted {
  rep::Record row;
  std::string case_text;
  int64_t T;
  bool uniform;
};

}  // namespace

void check_route_names(const ExpertLoadOptions& o) {
  for (const auto& name : o.routes) (void)route_keys(name);
}

bool expert_load_routes(const ExpertLoadOptions& o, rep::CsvWriter& csv) {
  const Layer layer = layer_of(o.full);
  const std::string how = on_cuda(o) ? "cuda_mma" : "cpu_simd";
  std::vector<std::string> routes = o.routes;
  if (routes.empty())
    routes = o.full ? std::vector<std::string>{"uniform", "ratio-1",  "ratio-2", "ratio-4",
                                               "ratio-8", "zipf-0.5", "zipf-1",  "zipf-2",
                                               "hot-6",   "hot-16",   "hot-32"}
                    : std::vector<std::string>{"uniform", "ratio-1", "ratio-2", "ratio-4",
                                               "zipf-1",  "hot-4",   "hot-8"};
  const std::vector<int64_t> lengths = o.route_tokens > 0 ? std::vector<int64_t>{o.route_tokens}
                                       : o.full           ? std::vector<int64_t>{8, 64, 512}
                                                          : std::vector<int64_t>{16, 256};
  const auto ops = bench::all_ops();
  const auto& op = find_op(ops);
  std::vector<Wanted> wanted;
  std::vector<bench::JobGroup> groups;
  std::map<int64_t, double> uniform_us;  // by T
  if (csv.resumed_rows() > 0) {
    const auto old = rep::read_csv(csv.path());
    for (size_t i = 0; i < old.rows.size(); ++i)
      if (old.cell(i, "part") == "synthetic" && old.cell(i, "routes") == "uniform" &&
          old.cell(i, "model") == layer.name())
        if (const auto us = old.number(i, "median_us"))
          uniform_us[static_cast<int64_t>(old.number(i, "tokens").value_or(0))] = *us;
  }
  for (const int64_t T : lengths)
    for (const auto& name : routes) {
      const std::string keys = route_keys(name);
      rep::Record r;
      r.set("part", "synthetic")
          .set("model", layer.name())
          .set("layer", "all")
          .set("routes", name)
          .set("tokens", T);
      r.set("impl", std::string(kOp) + "." + how);
      if (csv.has(r)) continue;
      const auto load = route_load(op, T, layer, keys, o.seed);
      r.set("experts", layer.E).set("top_k", layer.K);
      set_load(r, load);
      r.set("noise_floor_global", maxvio_noise_floor(layer.E, layer.K, T, o.seed));
      const auto selected = bench::select_jobs(
          ops, {.ops = {kOp},
                .impls = {how},
                .cases = {fmt::format("T={},d={},m={},E={},K={},shared_m={},moe_accum={}{}", T,
                                      layer.d, layer.m, layer.E, layer.K, layer.shared_m,
                                      bench::field_to_text(o.flags.moe_accum), keys)},
                .cache = "cold"});
      if (selected.empty()) throw Error(ExitCode::nothing_ran, "no such job", kOp, how);
      wanted.push_back({std::move(r), selected[0].info.text, T, name == "uniform"});
      groups.push_back(selected[0]);
    }
  if (groups.empty()) return true;

  bool passed = true;
  bench::RunOptions run;
  run.time = device_timed(o);
  run.seed = o.seed;
  run.timing.job_seconds = o.route_seconds;
  run.timing.seed = o.seed;
  bench::run_jobs(groups, run, nullptr, [&](const rep::Row& t) {
    passed = passed && t.status != "failed" && t.status != "error";
    for (auto& w : wanted) {
      if (w.case_text != t.case_text || csv.has(w.row)) continue;
      rep::Record& r = w.row;
      r.set("isa", t.resolved_isa)
          .set("check", t.status)
          .set("check_reason", t.reason)
          .set("repro", t.repro);
      if (t.timed()) {
        if (w.uniform) uniform_us[w.T] = *t.median_us;
        r.set("samples", t.samples)
            .set("q1_us", t.q1_us)
            .set("median_us", t.median_us)
            .set("q3_us", t.q3_us);
        if (const auto u = uniform_us.find(w.T); u != uniform_us.end())
          r.set("time_over_uniform", *t.median_us / u->second);
        r.set("gflop_s", t.gflop_s)
            .set("gb_s", t.gb_s)
            .set("roof", t.roof)
            .set("pct_of_roof", t.pct_of_roof);
      }
      const bool ran = t.status == "passed" || t.status == "suspect";
      r.set("status", ran ? "ok" : t.status).set("reason", ran ? "" : t.reason);
      write_row(o, csv, r);
    }
  });
  return passed;
}

}  // namespace v3b::scen
