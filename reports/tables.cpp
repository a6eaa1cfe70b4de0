// The explicit list of tables and the generic one.
#include <algorithm>
#include <filesystem>

#include "model/error.h"
#include "reports/table.h"

namespace v3b::rep {

std::vector<std::string> table_bench(const CsvTable& t);        // table_bench.cpp
std::vector<std::string> table_kv_cache(const CsvTable& t);     // table_kv_cache.cpp
std::vector<std::string> table_expert_load(const CsvTable& t);  // table_expert_load.cpp
std::vector<std::string> table_yarn_perplexity(const CsvTable& t);
std::vector<std::string> table_mtp_decoding(const CsvTable& t);
std::vector<std::string> table_claims(const CsvTable& t);

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
      {"bench.csv", "Components: verdict and time", table_bench},
      {"kv_cache.csv", "KV cache: memory and decode step", table_kv_cache},
      {"expert_load.csv", "Expert load", table_expert_load},
      {"yarn_perplexity.csv", "Perplexity past the trained context", table_yarn_perplexity},
      {"mtp_decoding.csv", "Speculative decoding with the MTP module", table_mtp_decoding},
      {"claims.csv", "Published figures beside ours", table_claims},
      {"train.csv", "Training", table_generic},
  };
  return kinds;
}

std::string render_table(const std::string& csv_path) {
  const std::string file = std::filesystem::path(csv_path).filename().string();
  for (const auto& k : table_kinds()) {
    if (file != k.file) continue;
    const CsvTable t = read_csv(csv_path);
    std::string out = std::string("## ") + k.title + "\n";
    for (const auto& block : k.render(t)) out += "\n" + block + "\n";
    return out;
  }
  const CsvTable t = read_csv(csv_path);
  return "## " + file + "\n\n" + table_generic(t)[0] + "\n";
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
