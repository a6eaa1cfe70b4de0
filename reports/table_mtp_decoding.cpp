// mtp_decoding.csv as tables: acceptance by draft position, speed, the forced-acceptance curve.
#include <algorithm>
#include <cstdio>
#include <map>

#include "reports/table.h"

namespace v3b::rep {
namespace {

using Rows = std::vector<std::vector<std::string>>;

std::string fixed(std::optional<double> v, int digits) {
  if (!v) return "";
  char s[40];
  std::snprintf(s, sizeof s, "%.*f", digits, *v);
  return s;
}
std::string percent(std::optional<double> v) { return v ? fixed(100 * *v, 1) + "%" : ""; }

std::string decoding(const CsvTable& t, size_t i) {
  if (t.cell(i, "decoding") == "greedy") return "greedy";
  return "T " + t.cell(i, "temperature") + ", top-p " + t.cell(i, "top_p");
}

std::string block(const std::string& title, const std::vector<std::string>& header,
                  const Rows& rows, size_t left) {
  if (rows.empty()) return "";
  std::vector<Align> a(header.size(), Align::right);
  for (size_t i = 0; i < left; ++i) a[i] = Align::left;
  return "**" + title + "**\n\n" + markdown_table(header, rows, a);
}

std::string interval(const CsvTable& t, size_t i) {
  const auto low = t.number(i, "acceptance_low"), high = t.number(i, "acceptance_high");
  return low && high ? fixed(100 * *low, 1) + ".." + fixed(100 * *high, 1) + "%" : "";
}

bool is_forced(const CsvTable& t, size_t i) { return !t.cell(i, "forced_acceptance").empty(); }

std::string acceptance_block(const CsvTable& t) {
  Rows rows;
  for (size_t i = 0; i < t.rows.size(); ++i) {
    const bool text = t.cell(i, "kind") == "text";
    if (is_forced(t, i) || !(text || t.cell(i, "kind") == "position")) continue;
    if (t.cell(i, "domain") == "all") continue;  // in the table of speeds
    const auto a = t.number(i, "acceptance"), expected = t.number(i, "expected_acceptance");
    rows.push_back(
        {decoding(t, i), t.cell(i, "domain"),
         text ? "held-out text"
              : t.cell(i, "drafts") + (t.cell(i, "drafts") == "1" ? " draft" : " drafts") +
                    ", own continuation",
         t.cell(i, "position"), t.cell(i, "drafted"), percent(a ? a : expected), interval(t, i)});
  }
  return block("Acceptance of drafts by position, given that all before it were accepted",
               {"decoding", "domain", "after", "position", "drafts", "accepted", "95% interval"},
               rows, 3);
}

std::string rates(const CsvTable& t, size_t i, const std::string& who) {
  const auto q1 = t.number(i, who + "_q1_tokens_s"), m = t.number(i, who + "_median_tokens_s"),
             q3 = t.number(i, who + "_q3_tokens_s");
  return m && q1 && q3 ? fixed(m, 0) + " (" + fixed(q1, 0) + ".." + fixed(q3, 0) + ")" : "";
}

std::string identity_text(const CsvTable& t, size_t i) {
  if (t.cell(i, "decoding") != "greedy") return "";
  std::string s = t.cell(i, "identical_prompts") + " of " + t.cell(i, "prompts");
  if (const auto n = t.number(i, "near_ties"); n && *n > 0)
    s += ", " + t.cell(i, "near_ties") + (*n == 1 ? " near-tie" : " near-ties");
  if (const auto n = t.number(i, "mismatches"); n && *n > 0)
    s += ", " + t.cell(i, "mismatches") + " FAILED";
  return s;
}

std::string never_below_one(std::optional<double> v) {
  if (!v) return "";
  return *v > 1 ? "never (" + percent(v) + ")" : percent(v);
}

// Rows that only say why there is no figure have a reason in place of it.
bool measured(const CsvTable& t, size_t i) {
  return t.cell(i, "status") == "ok" || t.cell(i, "status") == "failed";
}

std::string speed_block(const CsvTable& t) {
  Rows rows;
  for (size_t i = 0; i < t.rows.size(); ++i) {
    if (t.cell(i, "kind") != "summary" || is_forced(t, i) || !measured(t, i)) continue;
    rows.push_back({decoding(t, i), t.cell(i, "domain"), t.cell(i, "drafts"),
                    fixed(t.number(i, "tokens_per_step"), 2), rates(t, i, "plain"),
                    rates(t, i, "speculative"), short_time_us(t.number(i, "base_us")),
                    short_time_us(t.number(i, "verify_us")), short_time_us(t.number(i, "draft_us")),
                    fixed(t.number(i, "verify_over_base"), 2) + " + " +
                        fixed(t.number(i, "draft_over_base"), 2),
                    never_below_one(t.number(i, "break_even_acceptance")),
                    fixed(t.number(i, "predicted_speedup"), 2),
                    fixed(t.number(i, "measured_speedup"), 2), identity_text(t, i)});
  }
  return block("Speed, plain and speculative decoding in turns on the same prompts",
               {"decoding", "domain", "drafts", "tokens/step", "plain tokens/s (quartiles)",
                "speculative tokens/s", "plain step", "verify", "drafting", "r_v + r_d",
                "breaks even at", "predicted speed-up", "measured", "same tokens as plain"},
               rows, 2);
}

std::string forced_block(const CsvTable& t) {
  Rows rows;
  for (size_t i = 0; i < t.rows.size(); ++i) {
    if (t.cell(i, "kind") != "summary" || !is_forced(t, i) || !measured(t, i)) continue;
    std::string reached;
    for (size_t j = 0; j < t.rows.size(); ++j)
      if (t.cell(j, "kind") == "position" && t.cell(j, "weights") == t.cell(i, "weights") &&
          t.cell(j, "prompt_set") == t.cell(i, "prompt_set") &&
          t.cell(j, "backend") == t.cell(i, "backend") &&
          t.cell(j, "max_new") == t.cell(i, "max_new") &&
          t.cell(j, "forced_acceptance") == t.cell(i, "forced_acceptance"))
        reached = percent(t.number(j, "acceptance"));
    rows.push_back({percent(t.number(i, "forced_acceptance")), reached, t.cell(i, "prompts"),
                    fixed(t.number(i, "tokens_per_step"), 2),
                    fixed(t.number(i, "verify_over_base"), 2) + " + " +
                        fixed(t.number(i, "draft_over_base"), 2),
                    fixed(t.number(i, "predicted_speedup"), 2),
                    fixed(t.number(i, "measured_speedup"), 2)});
  }
  return block(
      "Speed-up at a given acceptance (drafts replaced by an oracle, one a step, all costs kept; "
      "V3's published acceptance is 85-90%)",
      {"wanted", "reached", "prompts", "tokens/step", "r_v + r_d", "predicted speed-up",
       "measured"},
      rows, 0);
}

}  // namespace

std::vector<std::string> table_mtp_decoding(const CsvTable& t) {
  std::vector<std::string> blocks;
  for (size_t i = 0; i < t.rows.size(); ++i)
    if (t.cell(i, "kind") == "summary") {
      blocks.push_back("Model " + t.cell(i, "model") + ", " + t.cell(i, "backend") + ", prompts " +
                       t.cell(i, "prompt_set") + " of " + t.cell(i, "prompt_tokens") +
                       " tokens, up to " + t.cell(i, "max_new") + " new tokens each.");
      break;
    }
  for (auto b : {acceptance_block(t), speed_block(t), forced_block(t)})
    if (!b.empty()) blocks.push_back(std::move(b));
  std::map<std::string, int64_t> reasons;
  for (size_t i = 0; i < t.rows.size(); ++i)
    if (!measured(t, i)) ++reasons[t.cell(i, "reason")];
  for (const auto& [reason, n] : reasons)
    blocks.push_back(std::to_string(n) + " settings not measured: " + reason + ".");
  return blocks;
}

}  // namespace v3b::rep
