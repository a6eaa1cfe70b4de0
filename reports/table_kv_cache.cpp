// kv_cache.csv as three tables: bytes a token and what fits, memory as it was really taken, decode
// step beside bytes.
#include <algorithm>
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

// One line a preset, form and dtype: formula, and the longest context in each memory (batch 1, or
// the smallest).
std::string size_block(const CsvTable& t) {
  std::vector<double> memories;
  double batch = 0;
  for (size_t i = 0; i < t.rows.size(); ++i) {
    if (t.cell(i, "kind") != "fit") continue;
    const double m = t.number(i, "memory_bytes").value_or(0), b = t.number(i, "batch").value_or(1);
    if (std::find(memories.begin(), memories.end(), m) == memories.end()) memories.push_back(m);
    batch = batch == 0 ? b : std::min(batch, b);
  }
  std::sort(memories.begin(), memories.end());
  std::vector<std::string> header = {"model",   "form",
                                     "dtype",   "B/token/layer",
                                     "B/token", "smaller than MHA",
                                     "x MLA",   "one 128K sequence"};
  for (const double m : memories) header.push_back("longest in " + short_bytes(m));
  std::map<std::string, size_t> line_of;
  Rows rows;
  for (size_t i = 0; i < t.rows.size(); ++i) {
    if (t.cell(i, "kind") != "fit" || t.cell(i, "status") != "ok" || t.number(i, "batch") != batch)
      continue;
    const std::string key =
        t.cell(i, "preset") + '\t' + t.cell(i, "form") + '\t' + t.cell(i, "dtype");
    if (line_of.count(key) == 0) {
      line_of[key] = rows.size();
      const auto token = t.number(i, "bytes_per_token");
      rows.push_back({t.cell(i, "preset"), form_name(t, i), t.cell(i, "dtype"),
                      t.cell(i, "bytes_per_token_layer"), t.cell(i, "bytes_per_token"),
                      times(t.number(i, "mha_over_this")),
                      short_number(t.number(i, "this_over_mla")),
                      token ? short_bytes(*token * 131072) : ""});
      rows.back().resize(header.size());
    }
    const auto at =
        std::find(memories.begin(), memories.end(), t.number(i, "memory_bytes").value_or(0));
    std::string fit = t.cell(i, "longest_context");
    const auto n = t.number(i, "longest_context"), most = t.number(i, "model_max_context");
    if (n && most && *n > *most) fit += " (model: " + t.cell(i, "model_max_context") + ")";
    rows[line_of[key]][8 + static_cast<size_t>(at - memories.begin())] = fit;
  }
  return block(
      "Cache size by formula, and the longest context of one sequence when all of that memory is "
      "cache",
      header, rows);
}

// Formula, allocator and process beside each other for the longest measured context of each form.
std::string memory_block(const CsvTable& t) {
  std::map<std::string, size_t> best;
  std::vector<std::string> order;
  for (size_t i = 0; i < t.rows.size(); ++i) {
    if (t.cell(i, "kind") != "size" || t.cell(i, "process_bytes").empty()) continue;
    const std::string key =
        t.cell(i, "preset") + '\t' + t.cell(i, "form") + '\t' + t.cell(i, "dtype");
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
    const auto f = t.number(i, "measured_formula_bytes"), a = t.number(i, "allocated_bytes"),
               p = t.number(i, "process_bytes");
    rows.push_back({t.cell(i, "preset"), form_name(t, i), t.cell(i, "dtype"),
                    context_text(t.number(i, "context")),
                    t.cell(i, "measured_layers") + " of " + t.cell(i, "layers"),
                    t.cell(i, "measured_sequences"), short_bytes(f), short_bytes(a), short_bytes(p),
                    f && p && *f > 0 ? short_number(100 * (*p / *f - 1), 2) + "%" : ""});
  }
  return block("Cache really taken: the largest part of each form that was reserved and written",
               {"model", "form", "dtype", "context", "layers", "sequences", "formula", "allocator",
                "process grew", "over formula"},
               rows);
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
