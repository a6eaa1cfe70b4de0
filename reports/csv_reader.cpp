#define CSV_IO_NO_THREAD
#include <libfccp/csv.h>

#include <algorithm>
#include <charconv>
#include <filesystem>
#include <fstream>
#include <sstream>

#include "model/error.h"
#include "reports/csv.h"

namespace v3b::rep {
namespace {

using Quote = io::double_quote_escape<',', '"'>;

// The fields of one line; `line` is overwritten by the unescaping.
std::vector<std::string> split(char* line, const std::string& where) {
  std::vector<std::string> fields;
  try {
    while (line != nullptr) {
      char *begin = nullptr, *end = nullptr;
      io::detail::chop_next_column<Quote>(line, begin, end);
      Quote::unescape(begin, end);
      fields.emplace_back(begin, end);
    }
  } catch (const io::error::escaped_string_not_closed&) {
    throw Error(ExitCode::bad_input, "quotation mark", where, "a closing \"",
                "the end of the line");
  }
  return fields;
}

std::string joined(const std::vector<std::string>& v) {
  std::string s;
  for (const auto& x : v) s += (s.empty() ? "" : ", ") + x;
  return s;
}

void check_header(CsvTable& t, const CsvReadOptions& o) {
  for (size_t i = 0; i < t.header.size(); ++i)
    if (std::count(t.header.begin(), t.header.end(), t.header[i]) > 1)
      throw Error(ExitCode::bad_input, "column names", t.path + ", line 1", "each name once",
                  "'" + t.header[i] + "' twice");
  for (const auto& c : o.required)
    if (!t.has_column(c))
      throw Error(ExitCode::bad_input, "missing column", t.path + ", line 1", "'" + c + "'",
                  joined(t.header));
  if (o.known.empty()) return;
  for (const auto& c : t.header)
    if (std::find(o.known.begin(), o.known.end(), c) == o.known.end())
      t.warnings.push_back(t.path + ", line 1: unknown column '" + c + "' is ignored");
}

}  // namespace

CsvTable read_csv(const std::string& path, const CsvReadOptions& options) {
  std::error_code ec;
  if (!std::filesystem::exists(path, ec)) throw Error(ExitCode::not_found, "no such file", path);
  if (std::filesystem::is_directory(path, ec))
    throw Error(ExitCode::bad_input, "a folder", path, "a CSV file");
  std::ifstream in(path, std::ios::binary);
  std::ostringstream buffer;
  buffer << in.rdbuf();
  if (!in) throw Error(ExitCode::not_found, "cannot read", path);
  std::string text = buffer.str();
  if (text.empty())
    throw Error(ExitCode::bad_input, "header", path, "a header line", "an empty file");
  if (const size_t nul = text.find('\0'); nul != std::string::npos)
    throw Error(ExitCode::bad_input, "text", path + ", byte " + std::to_string(nul), "CSV",
                "a zero byte");
  if (options.drop_torn_last_line && text.back() != '\n') text.resize(text.rfind('\n') + 1);

  CsvTable t;
  t.path = path;
  io::LineReader lines(path, text.data(), text.data() + text.size());
  for (int64_t number = 1; char* line = lines.next_line(); ++number) {
    const std::string where = path + ", line " + std::to_string(number);
    if (number == 1) {
      t.header = split(line, where);
      check_header(t, options);
      continue;
    }
    if (*line == '\0') continue;
    auto fields = split(line, where);
    if (fields.size() != t.header.size())
      throw Error(ExitCode::bad_input, "number of fields", where, std::to_string(t.header.size()),
                  std::to_string(fields.size()));
    t.rows.push_back(std::move(fields));
  }
  if (t.header.empty())
    throw Error(ExitCode::bad_input, "header", path, "a header line", "an unfinished line");
  return t;
}

bool CsvTable::has_column(std::string_view name) const {
  return std::find(header.begin(), header.end(), name) != header.end();
}

const std::string& CsvTable::cell(size_t row, std::string_view column) const {
  static const std::string blank;
  const auto it = std::find(header.begin(), header.end(), column);
  return it == header.end() ? blank : rows[row][static_cast<size_t>(it - header.begin())];
}

std::optional<double> CsvTable::number(size_t row, std::string_view column) const {
  const std::string& s = cell(row, column);
  if (s.empty()) return std::nullopt;
  double v = 0;
  const auto r = std::from_chars(s.data(), s.data() + s.size(), v);
  if (r.ec != std::errc() || r.ptr != s.data() + s.size())
    throw Error(ExitCode::bad_input, "column '" + std::string(column) + "'",
                path + ", row " + std::to_string(row + 1), "a number", "'" + s + "'");
  return v;
}

Record CsvTable::record(size_t row) const {
  Record r;
  for (size_t i = 0; i < header.size(); ++i) r.set(header[i], rows[row][i]);
  return r;
}

}  // namespace v3b::rep
