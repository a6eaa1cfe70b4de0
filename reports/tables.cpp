// The explicit list of tables and the generic one.
#include <algorithm>
#include <filesystem>

#include "model/error.h"
#include "reports/table.h"

namespace v3b::rep {

std::vector<std::string> table_bench(const CsvTable& t);        // table_bench.cpp
std::string table_peers(const CsvTable& t);                     // the same; "" without timed rows
std::vector<std::string> table_kv_cache(const CsvTable& t);     // table_kv_cache.cpp
std::vector<std::string> table_expert_load(const CsvTable& t);  // table_expert_load.cpp
std::vector<std::string> table_yarn_perplexity(const CsvTable& t);
std::vector<std::string> table_mtp_decoding(const CsvTable& t);
std::vector<std::string> table_claims(const CsvTable& t);
std::vector<std::string> table_closure(const CsvTable& t);

namespace {

std::vector<std::string> table_generic(const CsvTable& t) {
  const auto& identity = identity_columns();
  std::vector<std::string> header;
  for (const auto& c : t.header)
    if (std::find(identity.begin(), identity.end(), c) == identity.end()) header.push_back(c);
  std::vector<std::vector<std::string>> rows;
  for (size_t i = 0; i < t.rows.size(); ++i) {
    rows.emplace_back();
    for (const auto& c : header) rows.back().push_back(t.cell(i, c));
  }
  return {markdown_table(header, rows)};
}

}  // namespace

const std::vector<TableKind>& table_kinds() {
  static const std::vector<TableKind> kinds = {
      {"bench.csv",
       "Components: verdict and time",
       table_bench,
       {"op", "impl", "resolved_isa", "case", "status", "reason", "err_over_bound", "cache_state",
        "median_us", "gflop_s", "gb_s", "roof", "pct_of_roof"}},
      {"kv_cache.csv",
       "KV cache: memory and decode step",
       table_kv_cache,
       {"kind",
        "preset",
        "form",
        "dtype",
        "context",
        "batch",
        "memory_bytes",
        "layers",
        "heads",
        "bytes_per_token_layer",
        "bytes_per_token",
        "bytes",
        "mha_over_this",
        "this_over_mla",
        "measured_layers",
        "measured_sequences",
        "measured_formula_bytes",
        "allocated_bytes",
        "process_bytes",
        "longest_context",
        "model_max_context",
        "step_status",
        "step_reason",
        "step_median_us",
        "step_gb_s",
        "step_roof",
        "step_pct_of_roof",
        "status"}},
      {"expert_load.csv",
       "Expert load",
       table_expert_load,
       {"part",
        "model",
        "tokens_from",
        "layer",
        "bias",
        "group_limit",
        "strategy",
        "step",
        "routes",
        "experts",
        "tokens",
        "batch_tokens",
        "maxvio_batch",
        "maxvio_batch_max",
        "noise_floor_batch",
        "maxvio_global",
        "noise_floor_global",
        "max_over_mean",
        "cv",
        "gini",
        "entropy",
        "dead_experts",
        "groups_per_token",
        "cross_entropy",
        "cross_entropy_change",
        "change_low",
        "change_high",
        "train_loss",
        "val_loss",
        "val_bits_per_byte",
        "impl",
        "check",
        "check_reason",
        "median_us",
        "time_over_uniform",
        "gflop_s",
        "gb_s",
        "roof",
        "pct_of_roof",
        "status",
        "reason"}},
      {"yarn_perplexity.csv",
       "Perplexity past the trained context",
       table_yarn_perplexity,
       {"kind",         "model",          "backend",
        "token_set",    "finetune_steps", "finetune_contexts",
        "variant",      "factor",         "trained_context",
        "docs",         "bin_begin",      "bin_end",
        "ppl",          "vs_none_nll",    "vs_none_low",
        "vs_none_high", "window",         "stride",
        "windows",      "token_mean_ppl", "window_mean_ppl",
        "status"}},
      {"mtp_decoding.csv",
       "Speculative decoding with the MTP module",
       table_mtp_decoding,
       {"kind",
        "model",
        "backend",
        "prompt_set",
        "prompt_tokens",
        "max_new",
        "decoding",
        "temperature",
        "top_p",
        "drafts",
        "forced_acceptance",
        "domain",
        "prompts",
        "position",
        "drafted",
        "acceptance",
        "acceptance_low",
        "acceptance_high",
        "tokens_per_step",
        "plain_median_tokens_s",
        "speculative_median_tokens_s",
        "verify_over_base",
        "draft_over_base",
        "predicted_speedup",
        "measured_speedup",
        "break_even_acceptance",
        "identical_prompts",
        "near_ties",
        "mismatches"}},
      {"closure.csv",
       "A forward pass and its parts",
       table_closure,
       {"op", "case", "status", "reason", "component", "shape", "calls", "median_us", "total_us",
        "share_pct", "in_pass_us"}},
      {"claims.csv",
       "Published figures beside ours",
       table_claims,
       {"number", "claim", "published", "measured", "scale", "verdict", "reason"}},
      {"train.csv", "Training", table_generic, {"step", "tokens", "loss", "val_loss"}},
  };
  return kinds;
}

std::string render_table(const std::string& csv_path) {
  const std::string file = std::filesystem::path(csv_path).filename().string();
  const TableKind* kind = nullptr;
  for (const auto& k : table_kinds())
    if (file == k.file) kind = &k;
  std::vector<std::string> required = {identity_columns()[0]};
  if (kind != nullptr)
    required.insert(required.end(), kind->required.begin(), kind->required.end());
  const CsvTable t = read_csv(csv_path, {.required = required});
  for (const auto& k : table_kinds())  // a copy under another name
    if (kind == nullptr && std::all_of(k.required.begin(), k.required.end(),
                                       [&](const auto& c) { return t.has_column(c); }))
      kind = &k;
  std::string out = "## " + (kind != nullptr ? std::string(kind->title) : file) + "\n";
  if (t.rows.empty()) return out + "\nNo rows.\n";
  for (const auto& block : kind != nullptr ? kind->render(t) : table_generic(t))
    out += "\n" + block + "\n";
  return out;
}

std::string render_peers(const std::string& csv_path) {
  const CsvTable t =
      read_csv(csv_path, {.required = {"op", "impl", "case", "status", "median_us", "peer"}});
  const std::string out = table_peers(t);
  if (out.empty())
    throw Error(ExitCode::not_found, "no timed row of ours", csv_path,
                "a bench.csv of `v3bench bench`");
  return out;
}

std::string render_all_tables(const std::string& dir, bool components) {
  std::string out;
  for (const auto& k : table_kinds()) {
    if (!components && std::string(k.file) == "bench.csv") continue;
    const std::string path = dir + "/" + k.file;
    if (std::filesystem::exists(path)) out += (out.empty() ? "" : "\n") + render_table(path);
  }
  if (out.empty())
    throw Error(ExitCode::not_found, "no result files", dir, "bench.csv or a scenario's CSV");
  return out;
}

}  // namespace v3b::rep
