#include "model/json_util.h"

#include <sys/stat.h>

#include <cerrno>
#include <cstring>
#include <fstream>
#include <set>
#include <vector>

#include "model/error.h"

namespace v3b::model {

namespace {
constexpr int kMaxDepth = 32;  // config.json nests 3 deep, a safetensors header 3
}

nlohmann::json parse_json(const std::string& text, const std::string& where) {
  using Event = nlohmann::json::parse_event_t;
  std::vector<std::set<std::string>> keys;
  auto callback = [&](int depth, Event event, nlohmann::json& value) {
    if (depth > kMaxDepth)
      throw Error(ExitCode::bad_input, "JSON nesting", where,
                  "at most " + std::to_string(kMaxDepth) + " levels", "more");
    if (event == Event::object_start) keys.emplace_back();
    if (event == Event::object_end && !keys.empty()) keys.pop_back();
    if (event == Event::key && !keys.empty()) {
      const auto& k = value.get_ref<const std::string&>();
      if (!keys.back().insert(k).second)
        throw Error(ExitCode::bad_input, "duplicate key", where, "each key once",
                    "\"" + k + "\" twice");
    }
    return true;
  };
  try {
    return nlohmann::json::parse(text, callback);
  } catch (const nlohmann::json::exception& e) {
    std::string found = e.what();
    if (const size_t at = found.find("] "); at != std::string::npos) found = found.substr(at + 2);
    if (found.size() > 160) found = found.substr(0, 157) + "...";
    throw Error(ExitCode::bad_input, "JSON syntax", where, "valid JSON", found);
  }
}

std::string read_text_file(const std::string& path, int64_t max_bytes) {
  struct stat st {};
  if (::stat(path.c_str(), &st) != 0)
    throw Error(errno == ENOENT || errno == ENOTDIR ? ExitCode::not_found : ExitCode::bad_input,
                "cannot open", path, "a readable file", std::strerror(errno));
  if (!S_ISREG(st.st_mode))
    throw Error(ExitCode::bad_input, "cannot open", path, "a regular file",
                S_ISDIR(st.st_mode) ? "a directory" : "a special file");
  if (st.st_size > max_bytes)
    throw Error(ExitCode::bad_input, "file size", path,
                "at most " + std::to_string(max_bytes) + " bytes", std::to_string(st.st_size));
  std::ifstream in(path, std::ios::binary);
  std::string text(static_cast<size_t>(st.st_size), '\0');
  in.read(text.data(), static_cast<std::streamsize>(text.size()));
  if (!in)
    throw Error(ExitCode::bad_input, "cannot read", path, std::to_string(st.st_size) + " bytes",
                "fewer");
  return text;
}

std::string brief(const nlohmann::json& v) {
  std::string s = v.dump(-1, ' ', false, nlohmann::json::error_handler_t::replace);
  if (s.size() > 60) s = s.substr(0, 57) + "...";
  return s;
}

}  // namespace v3b::model
