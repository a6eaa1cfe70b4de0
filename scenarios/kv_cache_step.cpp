#include "scenarios/kv_cache_step.h"

#include <fmt/format.h>

#include "bench/harness/check.h"
#include "bench/harness/shape_io.h"
#include "model/error.h"

namespace v3b::scen {

StepCase step_case(const KvForm& f, model::KvElem e, const model::ModelConfig& c, int64_t context,
                   int64_t batch, int64_t page, const spec::Flags& flags, bool cuda) {
  using model::KvElem, model::KvScheme;
  const int64_t n_h = c.num_attention_heads, d_n = c.qk_nope_head_dim, d_r = c.qk_rope_head_dim;
  if (e == KvElem::f16) return {.reason = "no attention kernel reads float16"};
  const char* dtype = e == KvElem::f32 ? "f32" : "bf16";
  // Tensor cores take bf16 and the 8-bit record.
  const char* how = !cuda ? "cpu_simd" : e == KvElem::f32 ? "cuda_simt" : "cuda_mma";
  if (f.scheme == KvScheme::mla)
    return {"mla_decode", how,
            fmt::format("B={},s={},n_h={},d_c={},d_r={},page={},dtype={},kv_format={},empty_lse={}",
                        batch, context, n_h, c.kv_lora_rank, d_r, page, dtype,
                        bench::field_to_text(cache_format(e, flags)),
                        bench::field_to_text(flags.empty_lse)),
            ""};
  if (e == KvElem::fp8)
    return {.reason =
                "8-bit keys and values of separate heads: no kernel; only MLA's record has one"};
  const bool expanded = f.scheme == KvScheme::mha_expanded;
  const int64_t n_kv = f.scheme == KvScheme::gqa ? f.groups : f.scheme == KvScheme::mqa ? 1 : n_h;
  return {"attention_decode", how,
          fmt::format("B={},s={},n_h={},n_kv={},d_qk={},d_v={},dtype={}", batch, context, n_h, n_kv,
                      expanded ? d_n + d_r : d_n, c.v_head_dim, dtype),
          ""};
}

std::string step_memory_problem(const bench::Ops& ops, const StepCase& s, double limit_gb) {
  // The harness holds the inputs, their copies for cold caches, and float64 values for the
  // reference.
  constexpr double kHeldPerByte = 8;
  for (const auto& op : ops) {
    if (op->name() != s.op) continue;
    const double bytes = op->cost(s.text).bytes,
                 free = static_cast<double>(bench::available_memory_bytes());
    if (bytes > limit_gb * 1e9)
      return fmt::format(
          "{:.2f} GB a layer, more than the {:.2f} GB that a measured step may read here "
          "(--step-gb)",
          bytes * 1e-9, limit_gb);
    if (free > 0 && bytes * kHeldPerByte > free)
      return fmt::format("checking it takes about {:.1f} GB, {:.1f} GB are free",
                         bytes * kHeldPerByte * 1e-9, free * 1e-9);
    return "";
  }
  throw Error(ExitCode::usage, "no such op", "kv-cache", s.op);
}

rep::Record& add_step(rep::Record& r, const rep::Row& job) {
  r.set("step_impl", job.impl).set("step_isa", job.resolved_isa).set("step_status", job.status);
  r.set("step_reason", job.reason).set("step_repro", job.repro);
  if (!job.timed()) return r;
  r.set("step_samples", job.samples)
      .set("step_q1_us", job.q1_us)
      .set("step_median_us", job.median_us);
  r.set("step_q3_us", job.q3_us).set("step_gb_s", job.gb_s).set("step_roof", job.roof);
  return r.set("step_pct_of_roof", job.pct_of_roof);
}

}  // namespace v3b::scen
