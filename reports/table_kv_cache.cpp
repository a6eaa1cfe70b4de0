// kv_cache.csv as three tables: bytes a token and what fits, memory as it was really taken, decode
// step beside bytes.
#include <algorithm>
#include <cmath>
#include <map>

#include "reports/table.h"

namespace v3b::rep {
namespace {

using Rows = std::vector<std::vector<std::string>>;

std::string form_name(const CsvTable& t, size_t i) {
  const std::string& form = t.cell(i, "form");
  return form == "mla" && t.cell(i, "dtype") == "fp8" ? "mla (8-bit record)" : form;
}

std::string times(std::optional<double> v) { return v ? short_number(v) + "x" : ""; }

// Contexts as people write them.
std::string context_text(std::optional<double> v) {
  if (!v) return "";
  const auto n = static_cast<long long>(*v);
  return n >= 1024 && n % 1024 == 0 ? std::to_string(n / 1024) + "K" : std::to_string(n);
}

std::string block(const std::string& title, const std::vector<std::string>& header,
                  const Rows& rows) {
  std::vector<Align> a(header.size(), Align::right);
  a[0] = a[1] = Align::left;
  return rows.empty() ? "" : "**" + title + "**\n\n" + markdown_table(header, rows, a);
}

// 12345 -> "12.1K": tokens, in units of 1024; a star where the model's own limit is below.
std::string tokens_text(std::optional<double> n, std::optional<double> most) {
  if (!n) return "";
  std::string s = *n < 1024          ? short_number(n)
                  : *n < 1024 * 1024 ? short_number(*n / 1024) + "K"
                                     : short_number(*n / 1024 / 1024) + "M";
  return most && *n > *most ? s + "*" : s;
}

// One line a preset and form: bf16 and 8-bit sizes by formula, and the longest context in each
// memory (of the smallest batch).
std::string size_block(const CsvTable& t) {
  std::vector<double> memories;
  std::vector<std::string> lines;
  std::map<std::string, size_t> at;  // preset, form, dtype, memory -> row
  double batch = 0;
  for (size_t i = 0; i < t.rows.size(); ++i) {
    if (t.cell(i, "kind") != "fit") continue;
    const double m = t.number(i, "memory_bytes").value_or(0), b = t.number(i, "batch").value_or(1);
    if (std::find(memories.begin(), memories.end(), m) == memories.end()) memories.push_back(m);
    batch = batch == 0 ? b : std::min(batch, b);
  }
  std::sort(memories.begin(), memories.end());
  const auto key = [&](const std::string& line, const std::string& dtype, double m) {
    return line + '\t' + dtype + '\t' + std::to_string(m);
  };
  for (size_t i = 0; i < t.rows.size(); ++i) {
    if (t.cell(i, "kind") != "fit" || t.cell(i, "status") != "ok" || t.number(i, "batch") != batch)
      continue;
    const std::string line = t.cell(i, "preset") + '\t' + t.cell(i, "form");
    if (std::find(lines.begin(), lines.end(), line) == lines.end()) lines.push_back(line);
    at[key(line, t.cell(i, "dtype"), t.number(i, "memory_bytes").value_or(0))] = i;
  }
  std::vector<std::string> header = {"model",         "form",
                                     "B/token/layer", "B/token",
                                     "8-bit B/token", "smaller than MHA",
                                     "x MLA",         "one 128K sequence"};
  for (const double m : memories)
    header.push_back("longest in " + short_bytes(m) + ", bf16 / 8-bit");
  Rows rows;
  for (const auto& line : lines) {
    const auto find = [&](const char* dtype, double m) -> std::optional<size_t> {
      const auto it = at.find(key(line, dtype, m));
      return it == at.end() ? std::nullopt : std::optional<size_t>(it->second);
    };
    const auto wide = find("bf16", memories[0]), narrow = find("fp8", memories[0]);
    if (!wide && !narrow) continue;
    const size_t i = wide ? *wide : *narrow;
    const auto token = t.number(i, "bytes_per_token");
    rows.push_back(
        {t.cell(i, "preset"), t.cell(i, "form"), wide ? t.cell(i, "bytes_per_token_layer") : "",
         wide ? t.cell(i, "bytes_per_token") : "", narrow ? t.cell(*narrow, "bytes_per_token") : "",
         wide ? times(t.number(i, "mha_over_this")) : "",
         wide ? short_number(t.number(i, "this_over_mla")) : "",
         wide && token ? short_bytes(*token * 131072) : ""});
    for (const double m : memories) {
      std::string cell;
      for (const char* dtype : {"bf16", "fp8"})
        if (const auto r = find(dtype, m)) {
          cell += (cell.empty() ? "" : " / ") +
                  tokens_text(t.number(*r, "longest_context"), t.number(*r, "model_max_context"));
        }
      rows.back().push_back(cell);
    }
  }
  std::string out = block(
      "Cache by formula (bf16 unless said otherwise), and the longest context of one sequence when "
      "all of that memory is cache",
      header, rows);
  if (!out.empty()) out += "\n* beyond the model's own max_position_embeddings. 1K = 1024 tokens.";
  return out;
}

// Formula, allocator and process beside each other: for each form the largest measured part of the
// first model, and the worst deviation of all measured rows.
std::string memory_block(const CsvTable& t) {
  std::map<std::string, size_t> best;
  std::vector<std::string> order;
  std::string preset;
  double worst = 0;
  size_t worst_row = 0, measured = 0;
  for (size_t i = 0; i < t.rows.size(); ++i) {
    if (t.cell(i, "kind") != "size" || t.cell(i, "process_bytes").empty()) continue;
    const double formula = t.number(i, "measured_formula_bytes").value_or(0);
    const double off = formula > 0 ? t.number(i, "process_bytes").value_or(0) / formula - 1 : 0;
    if (measured++ == 0 || std::fabs(off) > std::fabs(worst)) worst = off, worst_row = i;
    if (preset.empty()) preset = t.cell(i, "preset");
    if (t.cell(i, "preset") != preset) continue;
    const std::string key = t.cell(i, "form") + '\t' + t.cell(i, "dtype");
    const auto covered = [&](size_t r) {
      return t.number(r, "measured_formula_bytes").value_or(0);
    };
    if (best.count(key) == 0)
      order.push_back(key), best[key] = i;
    else if (covered(i) > covered(best[key]))
      best[key] = i;
  }
  Rows rows;
  for (const auto& key : order) {
    const size_t i = best[key];
    rows.push_back({t.cell(i, "preset"), form_name(t, i), t.cell(i, "dtype"),
                    context_text(t.number(i, "context")),
                    t.cell(i, "measured_layers") + " of " + t.cell(i, "layers"),
                    t.cell(i, "measured_sequences") + " of " + t.cell(i, "batch"),
                    t.cell(i, "measured_formula_bytes"), t.cell(i, "allocated_bytes"),
                    t.cell(i, "process_bytes")});
  }
  const bool parts = !rows.empty();
  for (size_t i = 0; i < t.rows.size(); ++i) {  // real forward passes
    if (t.cell(i, "kind") != "run" || t.cell(i, "allocated_bytes").empty()) continue;
    rows.push_back({t.cell(i, "preset") + " (forward pass)", form_name(t, i), t.cell(i, "dtype"),
                    context_text(t.number(i, "context")),
                    t.cell(i, "measured_layers") + " of " + t.cell(i, "layers"),
                    t.cell(i, "measured_sequences") + " of " + t.cell(i, "batch"),
                    t.cell(i, "measured_formula_bytes"), t.cell(i, "allocated_bytes"),
                    t.cell(i, "process_bytes")});
  }
  std::string out = block(
      "Cache really taken, in bytes: for each form the largest part that was reserved and written",
      {"model", "form", "dtype", "context", "layers", "sequences", "formula", "allocator",
       "process grew"},
      rows);
  if (parts)
    out += "\nOf " + std::to_string(measured) +
           " measured rows, the process grew furthest from the formula for " +
           t.cell(worst_row, "preset") + " " + form_name(t, worst_row) + " " +
           t.cell(worst_row, "dtype") + " at " + context_text(t.number(worst_row, "context")) +
           ": " + (worst >= 0 ? "+" : "") + short_number(100 * worst, 2) + "% of " +
           short_bytes(t.number(worst_row, "measured_formula_bytes")) + ".";
  return out;
}

std::string step_block(const CsvTable& t) {
  Rows rows;
  std::map<std::string, double> mha;  // preset, context, batch -> median of bf16 MHA
  const auto group = [&](size_t i) {
    return t.cell(i, "preset") + '\t' + t.cell(i, "context") + '\t' + t.cell(i, "batch") + '\t';
  };
  for (size_t i = 0; i < t.rows.size(); ++i)
    if (t.cell(i, "kind") == "step" && t.cell(i, "form") == "mha" && t.cell(i, "dtype") == "bf16")
      if (const auto us = t.number(i, "step_median_us")) mha[group(i)] = *us;
  std::vector<size_t> order;
  for (size_t i = 0; i < t.rows.size(); ++i)
    if (t.cell(i, "kind") == "step" && t.cell(i, "step_status") != "unsupported")
      order.push_back(i);
  std::map<std::string, size_t> first;
  for (const size_t i : order) first.emplace(group(i), i);
  std::stable_sort(order.begin(), order.end(),
                   [&](size_t a, size_t b) { return first[group(a)] < first[group(b)]; });
  for (const size_t i : order) {
    const auto us = t.number(i, "step_median_us"), layer = t.number(i, "bytes_per_token_layer"),
               context = t.number(i, "context"), batch = t.number(i, "batch"),
               pct = t.number(i, "step_pct_of_roof");
    std::string verdict = t.cell(i, "step_status");
    if (verdict != "passed") verdict += ": " + t.cell(i, "step_reason");
    rows.push_back({t.cell(i, "preset") + ", " + t.cell(i, "heads") + " heads", form_name(t, i),
                    t.cell(i, "dtype"), context_text(context), t.cell(i, "batch"),
                    layer && context && batch ? short_bytes(*layer * *context * *batch) : "",
                    short_bytes(t.number(i, "bytes")), verdict, short_time_us(us),
                    us && mha.count(group(i)) ? times(mha[group(i)] / *us) : "",
                    short_number(t.number(i, "step_gb_s")),
                    pct ? short_number(pct, 2) + "% " + t.cell(i, "step_roof") : ""});
  }
  return block(
      "Decode step of one layer's attention core beside the cache it reads (without the "
      "projections)",
      {"model", "form", "dtype", "context", "batch", "cache a layer", "cache in all", "check",
       "step", "faster than MHA", "GB/s", "of roof"},
      rows);
}

}  // namespace

std::vector<std::string> table_kv_cache(const CsvTable& t) {
  std::vector<std::string> blocks;
  for (auto b : {size_block(t), memory_block(t), step_block(t)})
    if (!b.empty()) blocks.push_back(std::move(b));
  int64_t unmeasured = 0;
  for (size_t i = 0; i < t.rows.size(); ++i)
    unmeasured += t.cell(i, "step_status") == "unsupported";
  if (unmeasured > 0)
    blocks.push_back(std::to_string(unmeasured) +
                     " decode steps were not measured; step_reason in the file says why.");
  return blocks;
}

}  // namespace v3b::rep
