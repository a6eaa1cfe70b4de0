// yarn_perplexity.csv as tables: perplexity by position for every variant, the same after
// fine-tuning, and sliding windows in both definitions.
#include <algorithm>
#include <cstdio>
#include <map>
#include <set>

#include "reports/table.h"

namespace v3b::rep {
namespace {

using Rows = std::vector<std::vector<std::string>>;
using Range = std::pair<int64_t, int64_t>;

std::string position_text(int64_t n) {
  return n >= 1024 && n % 1024 == 0 ? std::to_string(n / 1024) + "K" : std::to_string(n);
}

int64_t integer(const CsvTable& t, size_t i, const char* column) {
  return static_cast<int64_t>(t.number(i, column).value_or(0));
}

Range range_of(const CsvTable& t, size_t i) {
  return {integer(t, i, "bin_begin"), integer(t, i, "bin_end")};
}

// "+0.123 [0.100, 0.150]"; an interval that leaves out zero is marked.
std::string difference(const CsvTable& t, size_t i, const std::string& name) {
  const auto d = t.number(i, "vs_" + name + "_nll"), low = t.number(i, "vs_" + name + "_low"),
             high = t.number(i, "vs_" + name + "_high");
  if (!d || !low || !high) return "";
  const auto fixed = [](double v) {
    char s[32];
    std::snprintf(s, sizeof s, "%+.3f", v);
    return std::string(s);
  };
  return fixed(*d) + " [" + fixed(*low) + ", " + fixed(*high) + "]" +
         (*low > 0 || *high < 0 ? " *" : "");
}

// Everything but the variant: rows that may stand in one table.
std::string group_of(const CsvTable& t, size_t i) {
  return t.cell(i, "model") + '\t' + t.cell(i, "backend") + '\t' + t.cell(i, "token_set") + '\t' +
         t.cell(i, "finetune_steps") + '\t' + t.cell(i, "finetune_contexts");
}

std::string title_of(const CsvTable& t, size_t i) {
  std::string s = t.cell(i, "model") + ", trained on " + t.cell(i, "trained_context") + " tokens";
  const std::string& steps = t.cell(i, "finetune_steps");
  if (steps != "0" && !steps.empty()) {
    std::string contexts = t.cell(i, "finetune_contexts");
    const std::string_view then = ", then ";
    for (size_t at = 0; (at = contexts.find(' ', at)) != std::string::npos; at += then.size())
      contexts.replace(at, 1, then);
    s += ", fine-tuned " + steps + " steps a phase at " + contexts + " tokens";
  }
  return s + " (" + t.cell(i, "token_set") + ", " + t.cell(i, "backend") + ")";
}

std::string variant_block(const CsvTable& t, const std::vector<size_t>& rows) {
  const size_t first = rows[0];
  const int64_t L = integer(t, first, "trained_context");
  std::set<Range> bins;
  int64_t length = 0;
  for (size_t i = 0; i < t.rows.size(); ++i)
    if (t.cell(i, "kind") == "document" && group_of(t, i) == group_of(t, first))
      bins.insert(range_of(t, i));
  for (const size_t i : rows) length = std::max(length, range_of(t, i).second);
  const Range past{length > L ? L : 0, length};
  std::vector<std::string> header = {"variant", "s"};
  for (const auto& b : bins)
    header.push_back(position_text(b.first) + ".." + position_text(b.second));
  const std::string past_name = length > L ? "past " + position_text(L) : "all";
  const bool tuned = integer(t, first, "finetune_steps") > 0;
  header.push_back(past_name);
  header.push_back(past_name + ": nats over YaRN");
  header.push_back(past_name + ": nats over none");
  if (tuned) header.push_back(past_name + ": nats over the same before");
  std::vector<std::string> order;
  std::map<std::string, std::map<Range, size_t>> lines;
  for (const size_t i : rows) {
    const std::string key = t.cell(i, "variant") + '\t' + t.cell(i, "factor");
    if (lines.count(key) == 0) order.push_back(key);
    lines[key][range_of(t, i)] = i;
  }
  Rows out;
  for (const auto& key : order) {
    const auto& line = lines[key];
    const size_t tab = key.find('\t');
    out.push_back({key.substr(0, tab), key.substr(tab + 1)});
    const auto ppl = [&](const Range& r) {
      const auto it = line.find(r);
      if (it == line.end()) return std::string();
      if (t.cell(it->second, "status") != "ok") return t.cell(it->second, "status");
      return short_number(t.number(it->second, "ppl"));
    };
    for (const auto& b : bins) out.back().push_back(ppl(b));
    out.back().push_back(ppl(past));
    const auto it = line.find(past);
    for (const char* name : {"yarn", "none", "untuned"})
      if (tuned || std::string(name) != "untuned")
        out.back().push_back(it == line.end() ? "" : difference(t, it->second, name));
  }
  std::vector<Align> align(header.size(), Align::right);
  align[0] = Align::left;
  return "**Perplexity by position. " + title_of(t, first) + "**\n\n" +
         markdown_table(header, out, align);
}

std::string window_block(const CsvTable& t) {
  Rows rows;
  for (size_t i = 0; i < t.rows.size(); ++i)
    if (t.cell(i, "kind") == "window")
      rows.push_back({t.cell(i, "window"), t.cell(i, "stride"), t.cell(i, "variant"),
                      t.cell(i, "factor"), t.cell(i, "docs"), t.cell(i, "windows"),
                      short_number(t.number(i, "token_mean_ppl")),
                      short_number(t.number(i, "window_mean_ppl")), t.cell(i, "status")});
  if (rows.empty()) return "";
  std::vector<Align> align(9, Align::right);
  align[2] = Align::left;
  return "**Sliding windows, both definitions of perplexity**\n\n" +
         markdown_table({"window", "stride", "variant", "s", "documents", "windows",
                         "ppl, mean over tokens", "ppl, mean over windows", "status"},
                        rows, align);
}

}  // namespace

std::vector<std::string> table_yarn_perplexity(const CsvTable& t) {
  std::vector<std::vector<size_t>> groups;
  for (size_t i = 0; i < t.rows.size(); ++i) {
    if (t.cell(i, "kind") != "bin") continue;
    const auto same = [&](const auto& g) { return group_of(t, g[0]) == group_of(t, i); };
    const auto it = std::find_if(groups.begin(), groups.end(), same);
    if (it == groups.end())
      groups.push_back({i});
    else
      it->push_back(i);
  }
  std::vector<std::string> blocks;
  for (const auto& g : groups) blocks.push_back(variant_block(t, g));
  if (!blocks.empty())
    blocks.push_back(
        "Differences are of the mean loss in nats a token over the same tokens, with a 95% "
        "bootstrap interval over documents; * marks intervals without zero. s: scale factor L'/L.");
  if (auto w = window_block(t); !w.empty()) blocks.push_back(std::move(w));
  return blocks;
}

}  // namespace v3b::rep
