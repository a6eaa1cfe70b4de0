// Readable tables made from CSV alone (`v3bench table DIR`).
#pragma once
#include <string>
#include <vector>

#include "reports/csv.h"

namespace v3b::rep {

enum class Align { left, right };
// GitHub Markdown; columns are padded so that it reads well as plain text too. `alignments` may be
// shorter than the header (left). Vertical bars in cells are escaped.
std::string markdown_table(const std::vector<std::string>& header,
                           const std::vector<std::vector<std::string>>& rows,
                           const std::vector<Align>& alignments = {});

// Numbers for people: 3 significant digits ("1.23", "12.3", "1 230" never: plain digits), "" for
// nullopt.
std::string short_number(std::optional<double> v, int significant = 3);
std::string short_bytes(std::optional<double> bytes);  // "1.5 GB", SI units
std::string short_time_us(std::optional<double> us);   // "1.5 ms"

// A table by file name: how a file of this name is shown. Scenario files add theirs in
// reports/table_<name>.cpp and one line in tables.cpp; a file without a function of its own gets
// every column that is not identity.
struct TableKind {
  const char* file;  // "kv_cache.csv"
  const char* title;
  std::vector<std::string> (*render)(const CsvTable&);  // Markdown blocks, joined by blank lines
  // Columns without which it would be another table. A column that joined the file later stands not here: older
  // files keep their table.
  std::vector<std::string> required;
};
const std::vector<TableKind>& table_kinds();

// Title and table of one file. A file of another name is shown by the columns it has; without schema_version (DESIGN
// 5) it is none of ours: Error(bad_input).
std::string render_table(const std::string& csv_path);
// Of a bench.csv: only the table of ours against the peers. Throws Error(not_found) where there is none.
std::string render_peers(const std::string& csv_path);
// Every known file there, bench.csv only with `components`; throws not_found if there is none.
std::string render_all_tables(const std::string& dir, bool components = true);

}  // namespace v3b::rep
