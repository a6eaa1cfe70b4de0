#include "model/corpus.h"

#include <charconv>
#include <fstream>
#include <sstream>

#include "model/error.h"
#include "model/hash.h"

namespace v3b::model {

namespace {

constexpr std::string_view kHeader = "doc_id\tdomain\tpackage\toffset_bytes\tlength_bytes";

std::string read_file(const std::string& path) {
  std::ifstream file(path, std::ios::binary | std::ios::ate);
  if (!file)
    throw Error(ExitCode::not_found, "cannot open corpus file", path,
                "what scripts/build_corpus.py writes", "no readable file");
  const std::streamoff size = file.tellg();
  std::string data(size > 0 ? static_cast<size_t>(size) : 0, '\0');
  file.seekg(0);
  if (size < 0 || !file.read(data.data(), size))
    throw Error(ExitCode::bad_input, "cannot read corpus file", path,
                std::to_string(size) + " bytes", std::to_string(file.gcount()));
  return data;
}

void check_text(std::string_view text, const std::string& path) {
  if (text.empty())
    throw Error(ExitCode::bad_input, "text", path + ", byte 0", "some text", "an empty file");
  const size_t bad = find_invalid_utf8(text);
  if (bad == std::string_view::npos) return;
  const std::string value = hex64(static_cast<unsigned char>(text[bad])).substr(14);
  throw Error(ExitCode::bad_input, "text", path + ", byte " + std::to_string(bad), "valid UTF-8",
              "0x" + value);
}

int64_t to_int(std::string_view field, const std::string& where) {
  int64_t value = 0;
  const auto [end, error] = std::from_chars(field.data(), field.data() + field.size(), value);
  if (error != std::errc() || end != field.data() + field.size() || value < 0)
    throw Error(ExitCode::bad_input, "number", where, "a non-negative integer", std::string(field));
  return value;
}

std::vector<std::string_view> split_tabs(std::string_view line) {
  std::vector<std::string_view> fields;
  for (size_t begin = 0;;) {
    const size_t tab = line.find('\t', begin);
    fields.push_back(line.substr(begin, tab == std::string_view::npos ? tab : tab - begin));
    if (tab == std::string_view::npos) return fields;
    begin = tab + 1;
  }
}

uint64_t hash_of(std::string_view text, const std::vector<Document>& documents) {
  uint64_t h = fnv1a64(text);
  for (const Document& d : documents) h = fnv1a64(std::to_string(d.text.size()), h);
  return h;
}

}  // namespace

Corpus Corpus::load(const std::string& dir, const std::string& split) {
  if (split != "train" && split != "validation" && split != "heldout")
    throw Error(ExitCode::usage, "split", dir, "train, validation or heldout", split);
  Corpus c;
  c.path_ = dir + "/" + split + ".txt";
  c.text_ = std::make_shared<const std::string>(read_file(c.path_));
  const std::string_view text = *c.text_;
  check_text(text, c.path_);
  const std::string index_path = dir + "/" + split + ".index.tsv";
  std::istringstream index(read_file(index_path));
  std::string line;
  if (!std::getline(index, line) || line != kHeader)
    throw Error(ExitCode::bad_input, "header", index_path + ", line 1", std::string(kHeader), line);
  size_t covered = 0;
  for (int64_t number = 2; std::getline(index, line); ++number) {
    const std::string where = index_path + ", line " + std::to_string(number);
    const auto f = split_tabs(line);
    if (f.size() != 5)
      throw Error(ExitCode::bad_input, "columns", where, "5", std::to_string(f.size()));
    const auto offset = static_cast<size_t>(to_int(f[3], where));
    const auto length = static_cast<size_t>(to_int(f[4], where));
    if (offset != covered)
      throw Error(ExitCode::bad_input, "offset_bytes", where, std::to_string(covered),
                  std::string(f[3]));
    if (length == 0 || length > text.size() - covered)
      throw Error(ExitCode::bad_input, "length_bytes", where,
                  "1 to " + std::to_string(text.size() - covered), std::string(f[4]));
    const std::string_view body = text.substr(offset, length);
    if ((static_cast<unsigned char>(body[0]) & 0xc0) == 0x80)
      throw Error(ExitCode::bad_input, "offset_bytes", where, "the start of a character",
                  std::string(f[3]));
    c.documents_.push_back({std::string(f[0]), std::string(f[1]), std::string(f[2]), body,
                            static_cast<int64_t>(offset)});
    covered += length;
  }
  if (covered != text.size())
    throw Error(ExitCode::bad_input, "documents", index_path,
                "to cover " + std::to_string(text.size()) + " bytes of " + c.path_,
                std::to_string(covered));
  c.hash_ = hash_of(text, c.documents_);
  return c;
}

Corpus Corpus::load_text_file(const std::string& path) {
  Corpus c;
  c.path_ = path;
  c.text_ = std::make_shared<const std::string>(read_file(path));
  check_text(*c.text_, path);
  c.documents_.push_back({path, "text", "", *c.text_, 0});
  c.hash_ = hash_of(*c.text_, c.documents_);
  return c;
}

}  // namespace v3b::model
