// CSV in and out (DESIGN 5): RFC 4180, UTF-8, LF, one header line, fixed column order. Blank means
// not measured. Numbers are written with std::to_chars, shortest form that reads back the same.
//
//   CsvWriter out(dir + "/kv_cache.csv", with_identity({"preset", "form", "context", "bytes"}),
//                 {"preset", "form", "context"}, resume);
//   Record key; key.set("preset", "v3").set("form", "mla").set("context", int64_t{1024});
//   if (!out.has(key)) { key.set("bytes", bytes).set(identity("cpu")); out.write(key); }
#pragma once
#include <cstdint>
#include <map>
#include <optional>
#include <set>
#include <string>
#include <string_view>
#include <type_traits>
#include <vector>

#include "reports/identity.h"

namespace v3b::rep {

// Shortest text that reads back as the same value; "" for NaN and infinities (blank = not
// measured).
std::string format_number(double v);
std::string format_number(float v);
std::string format_number(int64_t v);

// One row, by column name. set() twice on a column keeps the later value.
class Record {
 public:
  Record& set(std::string_view column, std::string_view text);
  Record& set(std::string_view column, const char* text) {
    return set(column, std::string_view(text));
  }
  Record& set(std::string_view column, const std::string& text) {
    return set(column, std::string_view(text));
  }
  Record& set(std::string_view column, bool v) {
    return set(column, std::string_view(v ? "1" : "0"));
  }
  template <class T>
  requires(std::is_arithmetic_v<T> && !std::is_same_v<T, bool>) Record& set(std::string_view column,
                                                                            T v) {
    if constexpr (std::is_same_v<T, float>)
      return set(column, std::string_view(format_number(v)));
    else if constexpr (std::is_floating_point_v<T>)
      return set(column, std::string_view(format_number(static_cast<double>(v))));
    else
      return set(column, std::string_view(format_number(static_cast<int64_t>(v))));
  }
  template <class T>
  Record& set(std::string_view column, const std::optional<T>& v) {  // nullopt: blank
    return v ? set(column, *v) : set(column, std::string_view());
  }
  Record& set(const Identity& id);

  std::string text(std::string_view column) const;  // "" when blank or never set
  const std::map<std::string, std::string, std::less<>>& fields() const { return fields_; }

 private:
  std::map<std::string, std::string, std::less<>> fields_;
};

// Writes one file. The header (and, when resuming, the finished rows) go to a temporary file beside
// `path` that is renamed to `path` at once; then every row is one write() at the end, so that an
// interrupted run leaves whole rows. Throws Error(cannot_write) for unwritable folders and full
// disks (a half-written row is cut off again), Error(usage) for a record with a column that the
// file does not have.
class CsvWriter {
 public:
  // key_columns identify a row for --resume. With resume and an existing file, its rows are kept
  // (columns that it lacks become blank) and has() knows them; without resume an existing file is
  // replaced. A row whose `drop_column` text is in `drop_values` is not taken over (failed attempts
  // are made again).
  CsvWriter(std::string path, std::vector<std::string> columns,
            std::vector<std::string> key_columns = {}, bool resume = false,
            const std::string& drop_column = "", const std::set<std::string>& drop_values = {});
  ~CsvWriter();
  CsvWriter(const CsvWriter&) = delete;
  CsvWriter& operator=(const CsvWriter&) = delete;

  void write(const Record& r);
  bool has(const Record& key) const;  // a row with the same key columns was taken over or written
  const std::string& path() const { return path_; }
  const std::vector<std::string>& columns() const { return columns_; }
  int64_t rows() const { return rows_; }  // taken over and written
  int64_t resumed_rows() const { return resumed_; }

 private:
  std::string line(const Record& r) const;
  std::string key(const Record& r) const;
  void append(const std::string& text);

  std::string path_;
  std::vector<std::string> columns_, key_columns_;
  std::set<std::string> keys_;
  int64_t rows_ = 0, resumed_ = 0, offset_ = 0;
  int fd_ = -1;
};

// A whole file by column name (Fast C++ CSV Parser underneath; fields may not contain line breaks).
struct CsvTable {
  std::string path;
  std::vector<std::string> header;
  std::vector<std::vector<std::string>> rows;
  std::vector<std::string> warnings;  // unknown extra columns
  bool has_column(std::string_view name) const;
  // "" if the file has no such column.
  const std::string& cell(size_t row, std::string_view column) const;
  // nullopt: blank. Throws Error(bad_input) naming file, line and column when it is no number.
  std::optional<double> number(size_t row, std::string_view column) const;
  Record record(size_t row) const;
};
struct CsvReadOptions {
  std::vector<std::string> required;  // missing one: Error(bad_input)
  std::vector<std::string>
      known;  // others are warned about (columns are only ever added); empty: all
  bool drop_torn_last_line = false;  // a last line without line end is ignored (resume)
};
// Columns are found by name, so any order is accepted. Errors name file, line, what was expected
// and found.
CsvTable read_csv(const std::string& path, const CsvReadOptions& options = {});

}  // namespace v3b::rep
