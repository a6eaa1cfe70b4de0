// expert_load.csv as tables: a model on text, the same with token dropping, training with each
// strategy, time over imbalance.
#include <algorithm>
#include <cstdio>

#include "reports/table.h"

namespace v3b::rep {
namespace {

using Rows = std::vector<std::vector<std::string>>;

std::string block(const std::string& title, const std::vector<std::string>& header,
                  const Rows& rows, size_t left) {
  std::vector<Align> a(header.size(), Align::right);
  std::fill_n(a.begin(), left, Align::left);
  return rows.empty() ? "" : "**" + title + "**\n\n" + markdown_table(header, rows, a);
}

std::string fixed(std::optional<double> v, int digits) {
  if (!v) return "";
  char text[64];
  std::snprintf(text, sizeof text, "%.*f", digits, *v);
  return text;
}

// MaxVio with its noise floor: "0.41 (floor 0.09)".
std::string with_floor(std::optional<double> v, std::optional<double> floor) {
  if (!v) return "";
  return fixed(v, 3) + (floor ? " (" + fixed(floor, 3) + ")" : "");
}

std::string model_block(const CsvTable& t) {
  Rows rows;
  std::string title;
  for (size_t i = 0; i < t.rows.size(); ++i) {
    if (t.cell(i, "part") != "model") continue;
    const bool all = t.cell(i, "layer") == "all";
    if (all && title.empty() && t.cell(i, "status") == "ok")
      title = t.cell(i, "model") +
              (t.cell(i, "reason").empty() ? "" : " (" + t.cell(i, "reason") + ")") + " on " +
              t.cell(i, "tokens_from") + ", T = " + t.cell(i, "tokens") + " tokens, batches of " +
              t.cell(i, "batch_tokens");
    std::string change;
    if (const auto c = t.number(i, "cross_entropy_change"))
      change = (*c >= 0 ? "+" : "") + fixed(c, 4) + " [" + fixed(t.number(i, "change_low"), 4) +
               ", " + fixed(t.number(i, "change_high"), 4) + "]";
    if (t.cell(i, "status") != "ok") change = t.cell(i, "reason");
    rows.push_back({t.cell(i, "bias"), t.cell(i, "group_limit"), t.cell(i, "layer"),
                    with_floor(t.number(i, "maxvio_batch"), t.number(i, "noise_floor_batch")),
                    with_floor(t.number(i, "maxvio_global"), t.number(i, "noise_floor_global")),
                    fixed(t.number(i, "max_over_mean"), 2), fixed(t.number(i, "cv"), 3),
                    fixed(t.number(i, "gini"), 3), fixed(t.number(i, "entropy"), 4),
                    t.cell(i, "dead_experts"), fixed(t.number(i, "groups_per_token"), 2),
                    fixed(t.number(i, "cross_entropy"), 4), change});
  }
  return block("Load of " + title + ". MaxVio with (noise floor at that T)",
               {"bias", "group limit", "layer", "MaxVio batch", "MaxVio global", "max/mean", "CV",
                "Gini", "entropy", "dead", "groups/token", "cross-entropy", "change [95%]"},
               rows, 3);
}

std::string capacity_block(const CsvTable& t) {
  Rows rows;
  std::string title;
  for (size_t i = 0; i < t.rows.size(); ++i) {
    if (t.cell(i, "part") != "capacity" || t.cell(i, "layer") != "all") continue;
    if (title.empty())
      title = t.cell(i, "model") +
              (t.cell(i, "reason").empty() ? "" : " (" + t.cell(i, "reason") + ")") + " on " +
              t.cell(i, "tokens_from") + ", " + t.cell(i, "tokens") + " tokens, capacity of " +
              t.cell(i, "batch_tokens") + " at a time";
    std::optional<double> worst;  // of the setting's layers
    for (size_t j = 0; j < t.rows.size(); ++j)
      if (t.cell(j, "part") == "capacity" && t.cell(j, "layer") != "all" &&
          t.cell(j, "routes") == t.cell(i, "routes") && t.cell(j, "bias") == t.cell(i, "bias"))
        if (const auto v = t.number(j, "dropped_pct"); v && (!worst || *v > *worst)) worst = v;
    std::string change;
    if (const auto c = t.number(i, "cross_entropy_change"))
      change = (*c >= 0 ? "+" : "") + fixed(c, 4) + " [" + fixed(t.number(i, "change_low"), 4) +
               ", " + fixed(t.number(i, "change_high"), 4) + "]";
    const std::string factor = t.cell(i, "capacity_factor");
    rows.push_back({t.cell(i, "bias"), factor.empty() ? "none" : factor, t.cell(i, "drop_policy"),
                    fixed(t.number(i, "dropped_pct"), 2) + "%", fixed(worst, 2) + "%",
                    fixed(t.number(i, "cross_entropy"), 4), change});
  }
  return block("Token dropping: " + title,
               {"bias", "capacity factor", "policy", "dropped", "worst layer", "cross-entropy",
                "change [95%]"},
               rows, 3);
}

std::string training_block(const CsvTable& t) {
  struct Line {
    std::string strategy;
    std::vector<size_t> rows;
  };
  std::vector<Line> lines;
  for (size_t i = 0; i < t.rows.size(); ++i) {
    if (t.cell(i, "part") != "training" || t.cell(i, "status") == "unsupported") continue;
    auto it = std::find_if(lines.begin(), lines.end(),
                           [&](const Line& l) { return l.strategy == t.cell(i, "strategy"); });
    if (it == lines.end()) it = lines.insert(lines.end(), {t.cell(i, "strategy"), {}});
    it->rows.push_back(i);
  }
  if (lines.empty()) return "";
  // Steps as columns: about five, spread over the run of the first strategy.
  std::vector<std::string> header = {"strategy"}, steps;
  const auto& first = lines[0].rows;
  const size_t n = std::min<size_t>(5, first.size());
  for (size_t k = 1; k <= n; ++k) steps.push_back(t.cell(first[k * first.size() / n - 1], "step"));
  for (const auto& s : steps) header.push_back("MaxVio to step " + s);
  for (const char* h : {"worst", "training loss", "validation loss", "bits/byte"})
    header.emplace_back(h);
  Rows rows;
  for (const auto& l : lines) {
    std::vector<std::string> r = {l.strategy};
    for (const auto& s : steps) {
      r.emplace_back();
      for (const size_t i : l.rows)
        if (t.cell(i, "step") == s) r.back() = fixed(t.number(i, "maxvio_batch"), 3);
    }
    const size_t last = l.rows.back();
    std::optional<double> worst;
    for (const size_t i : l.rows)
      if (const auto v = t.number(i, "maxvio_batch_max"); v && (!worst || *v > *worst)) worst = v;
    r.push_back(fixed(worst, 3));
    r.push_back(fixed(t.number(last, "train_loss"), 4));
    r.push_back(fixed(t.number(last, "val_loss"), 4));
    r.push_back(fixed(t.number(last, "val_bits_per_byte"), 4));
    rows.push_back(std::move(r));
  }
  const size_t i = first.back();
  std::string out = block(
      "Training " + t.cell(i, "model") +
          " from one seed: MaxVio over steps (mean of layers; T = " + t.cell(i, "batch_tokens") +
          " tokens a batch, noise floor " + fixed(t.number(i, "noise_floor_batch"), 3) + ")",
      header, rows, 1);
  return out;
}

std::string synthetic_block(const CsvTable& t) {
  Rows rows;
  for (size_t i = 0; i < t.rows.size(); ++i) {
    if (t.cell(i, "part") != "synthetic") continue;
    std::string verdict = t.cell(i, "check");
    if (verdict != "passed") verdict += ": " + t.cell(i, "check_reason");
    const auto over = t.number(i, "time_over_uniform"), pct = t.number(i, "pct_of_roof");
    rows.push_back({t.cell(i, "model"), t.cell(i, "routes"), t.cell(i, "tokens"),
                    with_floor(t.number(i, "maxvio_global"), t.number(i, "noise_floor_global")),
                    t.cell(i, "dead_experts") + " of " + t.cell(i, "experts"), t.cell(i, "impl"),
                    verdict, short_time_us(t.number(i, "median_us")),
                    over ? short_number(over) + "x" : "", short_number(t.number(i, "gflop_s")),
                    short_number(t.number(i, "gb_s")),
                    pct ? short_number(pct, 2) + "% " + t.cell(i, "roof") : ""});
  }
  return block(
      "Time of one expert layer over the imbalance of its routes. MaxVio with (noise floor at that "
      "T)",
      {"layer of", "routes", "T", "MaxVio", "unused experts", "implementation", "check", "median",
       "over uniform", "GFLOP/s", "GB/s", "of roof"},
      rows, 2);
}

}  // namespace

std::vector<std::string> table_expert_load(const CsvTable& t) {
  std::vector<std::string> blocks;
  for (auto b : {model_block(t), capacity_block(t), training_block(t), synthetic_block(t)})
    if (!b.empty()) blocks.push_back(std::move(b));
  return blocks;
}

}  // namespace v3b::rep
