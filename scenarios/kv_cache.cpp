// The kv-cache scenario: sizes by formula and in memory, what fits, and measured decode steps of
// one layer.
#include "scenarios/kv_cache.h"

#include <fmt/format.h>

#include <algorithm>
#include <filesystem>
#include <optional>
#include <set>

#include "bench/harness/jobs.h"
#include "bench/harness/run.h"
#include "bench/ops/registry.h"
#include "model/error.h"
#include "reports/machine.h"
#include "scenarios/backend_factory.h"
#include "scenarios/device.h"
#include "scenarios/kv_cache_step.h"

namespace v3b::scen {
namespace {

const std::vector<std::string> kColumns = {
    "kind", "preset", "form", "dtype", "context", "batch", "memory_bytes",
    // the formula
    "layers", "heads", "kv_groups", "elements_per_token_layer", "bytes_per_token_layer",
    "bytes_per_token", "bytes", "mha_over_this", "this_over_mla",
    // a part of it in memory
    "page_rows", "measured_layers", "measured_sequences", "measured_formula_bytes",
    "allocated_bytes", "process_bytes", "unmeasured_reason",
    // what fits
    "longest_context", "model_max_context",
    // the decode step
    "step_impl", "step_isa", "step_status", "step_reason", "step_samples", "step_q1_us",
    "step_median_us", "step_q3_us", "step_gb_s", "step_roof", "step_pct_of_roof", "step_repro",
    "status", "reason", "params"};
const std::vector<std::string> kKeys = {"kind",    "preset", "form",         "dtype",
                                        "context", "batch",  "memory_bytes", "device"};

struct Preset {
  std::string name;
  model::ModelConfig config;
};

std::vector<Preset> load_presets(const std::vector<std::string>& names) {
  std::vector<Preset> out;
  for (const auto& n : names) {
    std::error_code ec;
    const bool path =
        n.find('/') != std::string::npos || std::filesystem::exists(n + "/config.json", ec);
    out.push_back({n, path ? model::load_config(n) : model::load_preset(n)});
  }
  return out;
}

template <class T>
void set_default(std::vector<T>& v, const std::vector<T>& quick, const std::vector<T>& full,
                 bool is_full) {
  if (v.empty()) v = is_full ? full : quick;
}

KvCacheOptions with_defaults(KvCacheOptions o) {
  set_default<std::string>(o.presets, {"v3", "v2-lite", "kimi-k2", "tiny-v3"},
                           {"v3", "v2", "v2-lite", "moonlight", "kimi-k2", "tiny-v3"}, o.full);
  set_default<std::string>(
      o.forms, {"mha", "gqa-8", "gqa-4", "mqa", "mla-expanded", "mla"},
      {"mha", "gqa-16", "gqa-8", "gqa-4", "gqa-2", "mqa", "mla-expanded", "mla"}, o.full);
  set_default<std::string>(o.dtypes, {"bf16", "fp8"}, {"bf16", "fp8", "f32"}, o.full);
  set_default<int64_t>(o.contexts, {1024, 4096, 32768, 131072},
                       {1024, 2048, 4096, 8192, 16384, 32768, 65536, 131072}, o.full);
  set_default<int64_t>(o.run_contexts, {512, 4096}, {512, 4096, 16384}, o.full);
  set_default<int64_t>(o.batches, {1}, {1, 32}, o.full);
  set_default<double>(o.memory_gb,
                      {80, static_cast<double>(rep::machine_card().memory_bytes) * 1e-9},
                      {80, static_cast<double>(rep::machine_card().memory_bytes) * 1e-9}, o.full);
  set_default<std::string>(o.step_presets, {"v2-lite", "v3"}, {"v2-lite", "v3"}, o.full);
  set_default<int64_t>(o.step_contexts, {1024, 4096}, {1024, 4096, 16384, 32768}, o.full);
  set_default<int64_t>(o.step_batches, {1}, {1, 8}, o.full);
  if (o.measure_gb == 0) o.measure_gb = o.full ? 0.5 : 0.1;
  if (o.step_gb == 0) o.step_gb = o.full ? 2.5 : 0.1;
  if (o.step_seconds == 0) o.step_seconds = o.full ? 0.5 : 0.1;
  const auto positive = [](const std::vector<int64_t>& v, const char* flag) {
    for (const int64_t x : v)
      if (x < 1) throw Error(ExitCode::usage, "bad length", flag, "1 or more", std::to_string(x));
  };
  positive(o.contexts, "--contexts");
  positive(o.batches, "--batches");
  positive(o.run_contexts, "--run-contexts");
  positive(o.step_contexts, "--step-contexts");
  positive(o.step_batches, "--step-batches");
  positive({o.page}, "--page");
  for (const double gb : o.memory_gb)
    if (!(gb > 0 && gb < 1e9))
      throw Error(ExitCode::usage, "bad memory size", "--memory-gb", "more than 0",
                  fmt::format("{}", gb));
  if (!(o.measure_gb > 0))
    throw Error(ExitCode::usage, "bad memory size", "--measure-gb", "more than 0",
                fmt::format("{}", o.measure_gb));
  return o;
}

// Everything that the formula gives; also says that a form does not exist.
rep::Record formula_row(const char* kind, const Preset& p, const KvForm& f, model::KvElem e,
                        int64_t context, int64_t batch) {
  const auto& c = p.config;
  rep::Record r;
  r.set("kind", kind)
      .set("preset", p.name)
      .set("form", f.name)
      .set("dtype", model::kv_elem_name(e));
  if (context > 0) r.set("context", context);
  r.set("batch", batch).set("layers", c.num_hidden_layers).set("heads", c.num_attention_heads);
  const std::string problem = kv_form_problem(f, c);
  if (!problem.empty()) return r.set("status", "unsupported").set("reason", problem);
  const int64_t layer = model::kv_cache_bytes_per_layer(f.scheme, c, e, f.groups);
  const auto ratio = [&](model::KvScheme s) {
    return static_cast<double>(model::kv_cache_bytes_per_layer(s, c, e)) /
           static_cast<double>(layer);
  };
  if (f.scheme == model::KvScheme::gqa || f.scheme == model::KvScheme::mqa)
    r.set("kv_groups", f.groups);
  r.set("elements_per_token_layer", model::kv_cache_elements_per_layer(f.scheme, c, f.groups));
  r.set("bytes_per_token_layer", layer);
  r.set("bytes_per_token", model::kv_cache_bytes_per_token(f.scheme, c, e, f.groups));
  if (context > 0)
    r.set("bytes", model::kv_cache_bytes_per_token(f.scheme, c, e, f.groups) * context * batch);
  r.set("mha_over_this", ratio(model::KvScheme::mha))
      .set("this_over_mla", 1 / ratio(model::KvScheme::mla));
  return r.set("status", "ok");
}

void add_memory(rep::Record& r, const KvCacheOptions& o, const Preset& p, const KvForm& f,
                model::KvElem e, int64_t context, int64_t batch) {
  if (!device_missing(o).empty()) {
    r.set("unmeasured_reason", set_device_missing(r, o).text("reason"));
    return;
  }
  const auto m = measure_cache(model::kv_cache_bytes_per_layer(f.scheme, p.config, e, f.groups),
                               context, p.config.num_hidden_layers, batch, o.page,
                               static_cast<int64_t>(o.measure_gb * 1e9), on_cuda(o));
  r.set("page_rows", o.page);
  if (!m.reason.empty()) {
    r.set("unmeasured_reason", m.reason);
    return;
  }
  r.set("measured_layers", m.layers).set("measured_sequences", m.sequences);
  r.set("measured_formula_bytes", m.formula_bytes).set("allocated_bytes", m.allocated_bytes);
  r.set("process_bytes", m.process_bytes);
}

class Run {
 public:
  Run(const KvCacheOptions& o)
      : o_(o),
        csv_(open_csv(o, "kv_cache.csv", kColumns, kKeys)),
        presets_(load_presets(o.presets)) {
    for (const auto& f : o.forms) forms_.push_back(parse_kv_form(f));
    for (const auto& d : o.dtypes) elems_.push_back(parse_kv_elem(d));
  }

  void sizes() {
    Progress progress("kv-cache sizes",
                      static_cast<double>(presets_.size() * forms_.size() * elems_.size() *
                                          o_.contexts.size() * o_.batches.size()));
    each([&](const Preset& p, const KvForm& f, model::KvElem e) {
      for (const int64_t context : o_.contexts)
        for (const int64_t batch : o_.batches) {
          progress.show(
              fmt::format("{} {} {} at {}", p.name, f.name, model::kv_elem_name(e), context));
          auto r = formula("size", p, f, e, context, batch);
          if (!csv_->has(r)) {
            if (o_.measure_memory && r.text("status") == "ok")
              add_memory(r, o_, p, f, e, context, batch);
            write(r);
          }
          progress.advance(1);
        }
    });
    progress.finish();
  }

  void fits() {
    each([&](const Preset& p, const KvForm& f, model::KvElem e) {
      for (const double gb : o_.memory_gb)
        for (const int64_t batch : o_.batches) {
          const auto memory = static_cast<int64_t>(gb * 1e9);
          auto r = formula("fit", p, f, e, 0, batch);
          r.set("memory_bytes", memory)
              .set("page_rows", o_.page)
              .set("model_max_context", p.config.max_position_embeddings);
          if (r.text("status") == "ok")
            r.set("longest_context",
                  longest_context(memory,
                                  model::kv_cache_bytes_per_token(f.scheme, p.config, e, f.groups),
                                  batch, o_.page));
          if (!csv_->has(r)) write(r);
        }
    });
  }

  // The shipped (or given) model reads text of some length: its backend's cache beside the formula.
  void runs() {
    std::optional<LoadedModel> m;
    Preset p{o_.model.empty() ? "tiny-v3" : o_.model, {}};
    std::string missing;
    try {
      m = load_model(o_);
      p = {m->name, m->config()};
    } catch (const Error& e) {  // the other figures need no weights
      if (!o_.model.empty()) throw;
      missing = e.what();
    }
    for (const auto e : elems_) {
      if (!missing.empty()) {
        rep::Record r;
        r.set("kind", "run")
            .set("preset", p.name)
            .set("form", "mla")
            .set("dtype", model::kv_elem_name(e))
            .set("device", device_column(o_));
        r.set("status", "unsupported").set("reason", missing);
        if (!csv_->has(r)) write(r);
        continue;
      }
      for (const int64_t context : o_.run_contexts) {
        rep::Record r = formula("run", p, parse_kv_form("mla"), e, context, 1);
        if (csv_->has(r)) continue;
        if (!device_missing(o_).empty()) {
          r.set("unmeasured_reason", set_device_missing(r, o_).text("reason"));
          write(r);
          continue;
        }
        const auto x = measure_backend(*m, o_.backend, e, context, o_.page, o_.flags);
        r.set("page_rows", o_.page);
        if (x.reason.empty()) {
          r.set("measured_layers", x.layers).set("measured_sequences", x.sequences);
          r.set("measured_formula_bytes", x.formula_bytes)
              .set("allocated_bytes", x.allocated_bytes);
          r.set("process_bytes", x.process_bytes);
        } else {
          r.set("unmeasured_reason", x.reason);
        }
        write(r);
      }
    }
  }

  // Returns false when a kernel failed its check.
  bool steps() {
    const auto ops = bench::all_ops();
    std::vector<rep::Record> rows;  // waiting for their job's verdict and time
    std::vector<std::string> jobs;  // of the same row
    std::vector<bench::JobGroup> groups;
    std::set<std::string> seen;
    for (const auto& p : load_presets(o_.step_presets))
      for (const int64_t batch : o_.step_batches)
        for (const int64_t context : o_.step_contexts)
          for (const auto e : elems_)
            for (const auto& f : forms_) {
              rep::Record r = formula("step", p, f, e, context, batch);
              if (csv_->has(r)) continue;
              const StepCase s =
                  step_case(f, e, p.config, context, batch, o_.page, o_.flags, on_cuda(o_));
              std::string reason = r.text("reason");
              if (reason.empty()) reason = s.reason;
              if (reason.empty()) reason = step_memory_problem(ops, s, o_.step_gb);
              if (!reason.empty()) {
                r.set("step_status", "unsupported").set("step_reason", reason);
                write(r);
                continue;
              }
              const auto selected = bench::select_jobs(
                  ops, {.ops = {s.op}, .impls = {s.how}, .cases = {s.text}, .cache = "cold"});
              if (selected.empty())
                throw Error(ExitCode::nothing_ran, "no such job", s.op + "." + s.how, s.text);
              jobs.push_back(s.op + "/" + selected[0].info.text);
              rows.push_back(std::move(r));
              if (seen.insert(jobs.back()).second) groups.push_back(selected[0]);
            }
    bool passed = true;
    bench::RunOptions run;
    run.time = device_timed(o_);
    run.seed = o_.seed;
    run.timing.job_seconds = o_.step_seconds;
    run.timing.seed = o_.seed;
    if (!groups.empty())
      bench::run_jobs(groups, run, nullptr, [&](const rep::Row& t) {
        passed = passed && t.status != "failed" && t.status != "error";
        for (size_t i = 0; i < rows.size(); ++i)
          if (jobs[i] == t.op + "/" + t.case_text) {
            if (!device_missing(o_).empty()) set_device_missing(rows[i], o_);
            write(add_step(rows[i], t));
          }
      });
    return passed;
  }

  const rep::CsvWriter& csv() const { return *csv_; }

 private:
  void write(rep::Record& r) {
    csv_->write(r.set("params", params_text(o_)).set(rep::identity(device_column(o_))));
  }
  rep::Record formula(const char* kind, const Preset& p, const KvForm& f, model::KvElem e,
                      int64_t context, int64_t batch) const {
    return formula_row(kind, p, f, e, context, batch).set("device", device_column(o_));
  }
  template <class F>
  void each(const F& f) {
    for (const auto& p : presets_)
      for (const auto& form : forms_)
        for (const auto e : elems_) f(p, form, e);
  }

  const KvCacheOptions& o_;
  std::unique_ptr<rep::CsvWriter> csv_;
  std::vector<Preset> presets_;
  std::vector<KvForm> forms_;
  std::vector<model::KvElem> elems_;
};

}  // namespace

int run_kv_cache(const KvCacheOptions& options) {
  const KvCacheOptions o = with_defaults(options);
  if (o.measure_memory) {  // said before the formulas, not after
    (void)backend_name(o.backend, "");
    if (o.model.starts_with("random:"))
      (void)model::load_preset(o.model.substr(7));
    else if (!o.model.empty())
      (void)model::load_config(o.model);
  }
  Run run(o);
  run.fits();
  run.sizes();
  if (o.measure_memory) run.runs();
  const bool passed = !o.measure_step || run.steps();
  rep::write_machine_json(o.out);
  if (o.print_table) print_table(run.csv());
  finish_device(o);
  return static_cast<int>(passed ? ExitCode::ok : ExitCode::check_failed);
}

}  // namespace v3b::scen
