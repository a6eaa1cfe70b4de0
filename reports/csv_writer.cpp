#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <charconv>
#include <cmath>
#include <cstring>
#include <filesystem>

#include "model/error.h"
#include "reports/csv.h"

namespace v3b::rep {
namespace {

// RFC 4180 quoting. Line breaks become spaces: a row is a line, for every tool and for torn files.
std::string csv_quoted(std::string_view text) {
  std::string s(text);
  for (char& c : s)
    if (c == '\n' || c == '\r' || c == '\0') c = ' ';
  if (s.find_first_of(",\"") == std::string::npos) return s;
  std::string out = "\"";
  for (char c : s) {
    if (c == '"') out += '"';
    out += c;
  }
  return out + '"';
}

template <class T>
std::string to_text(T v) {
  char buf[64];
  const auto r = std::to_chars(buf, buf + sizeof buf, v);
  return std::string(buf, r.ptr);
}

[[noreturn]] void fail(const std::string& what, const std::string& path, int error) {
  throw Error(ExitCode::cannot_write, what, path, "", std::strerror(error));
}

}  // namespace

std::string format_number(double v) { return std::isfinite(v) ? to_text(v) : ""; }
std::string format_number(float v) { return std::isfinite(v) ? to_text(v) : ""; }
std::string format_number(int64_t v) { return to_text(v); }

Record& Record::set(std::string_view column, std::string_view text) {
  const auto it = fields_.find(column);
  if (it != fields_.end())
    it->second = text;
  else
    fields_.emplace(column, text);
  return *this;
}

Record& Record::set(const Identity& id) {
  set("schema_version", id.schema_version).set("run_id", id.run_id).set("utc_time", id.utc_time);
  set("commit", id.commit).set("dirty", id.dirty).set("machine", id.machine);
  return set("device", id.device);
}

std::string Record::text(std::string_view column) const {
  const auto it = fields_.find(column);
  return it == fields_.end() ? std::string() : it->second;
}

CsvWriter::CsvWriter(std::string path, std::vector<std::string> columns,
                     std::vector<std::string> key_columns, bool resume,
                     const std::string& drop_column, const std::set<std::string>& drop_values)
    : path_(std::move(path)), columns_(std::move(columns)), key_columns_(std::move(key_columns)) {
  for (const auto& k : key_columns_)
    if (std::find(columns_.begin(), columns_.end(), k) == columns_.end())
      throw Error(ExitCode::usage, "key column '" + k + "' is no column", path_);
  std::string text;
  for (const auto& c : columns_) text += (text.empty() ? "" : ",") + csv_quoted(c);
  text += '\n';
  std::error_code ec;
  if (resume && std::filesystem::exists(path_, ec) && std::filesystem::file_size(path_, ec) > 0) {
    const CsvTable old = read_csv(path_, {.required = key_columns_, .drop_torn_last_line = true});
    for (size_t i = 0; i < old.rows.size(); ++i) {
      if (!drop_column.empty() && drop_values.count(old.cell(i, drop_column)) != 0) continue;
      Record r = old.record(i), kept;
      for (const auto& c : columns_) kept.set(c, r.text(c));
      text += line(kept);
      keys_.insert(key(kept));
      ++resumed_;
    }
  }
  rows_ = resumed_;
  const std::string temporary = path_ + ".tmp." + std::to_string(getpid());
  fd_ = ::open(temporary.c_str(), O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0644);
  if (fd_ < 0) fail("cannot create", temporary, errno);
  try {
    append(text);
  } catch (...) {
    ::close(fd_);
    ::unlink(temporary.c_str());
    throw;
  }
  if (::rename(temporary.c_str(), path_.c_str()) != 0) {
    const int error = errno;
    ::close(fd_);
    ::unlink(temporary.c_str());
    fail("cannot rename " + temporary, path_, error);
  }
}

CsvWriter::~CsvWriter() {
  if (fd_ >= 0) ::close(fd_);
}

void CsvWriter::append(const std::string& text) {
  size_t done = 0;
  while (done < text.size()) {
    const ssize_t n = ::write(fd_, text.data() + done, text.size() - done);
    if (n < 0 && errno == EINTR) continue;
    if (n <= 0) {
      const int error = n < 0 ? errno : ENOSPC;
      if (::ftruncate(fd_, offset_) != 0) {
      }  // keep whole rows only; the error below is the one to report
      (void)::lseek(fd_, offset_, SEEK_SET);
      fail("cannot write row " + std::to_string(rows_ + 1), path_, error);
    }
    done += static_cast<size_t>(n);
  }
  offset_ += static_cast<int64_t>(text.size());
}

std::string CsvWriter::line(const Record& r) const {
  for (const auto& [name, value] : r.fields())
    if (std::find(columns_.begin(), columns_.end(), name) == columns_.end())
      throw Error(ExitCode::usage, "unknown column '" + name + "'", path_);
  std::string out;
  for (size_t i = 0; i < columns_.size(); ++i) {
    if (i > 0) out += ',';
    out += csv_quoted(r.text(columns_[i]));
  }
  return out + '\n';
}

std::string CsvWriter::key(const Record& r) const {
  std::string k;
  for (const auto& c : key_columns_) k += r.text(c) + '\x1f';
  return k;
}

bool CsvWriter::has(const Record& record) const {
  return !key_columns_.empty() && keys_.count(key(record)) != 0;
}

void CsvWriter::write(const Record& r) {
  append(line(r));
  ++rows_;
  if (!key_columns_.empty()) keys_.insert(key(r));
}

}  // namespace v3b::rep
