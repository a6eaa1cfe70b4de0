// The one exception type for bad input at the edges: files, flags, devices. One line, naming
// what, where, expected and found; main prints it and exits with `exit_code` (DESIGN 4).
#pragma once
#include <stdexcept>
#include <string>

namespace v3b {

enum class ExitCode : int {
  ok = 0,
  check_failed = 1,
  regression = 2,
  ambiguous = 3,
  nothing_ran = 4,
  case_missing = 5,
  machines_differ = 6,
  usage = 64,
  bad_input = 65,
  not_found = 66,
  cannot_write = 74
};

class Error : public std::runtime_error {
 public:
  // what: "safetensors header length"; where: "model.safetensors, byte 0"; expected and found may be empty.
  Error(ExitCode code, const std::string& what, const std::string& where,
        const std::string& expected = "", const std::string& found = "")
      : std::runtime_error(line(what, where, expected, found)), code_(code) {}
  ExitCode code() const { return code_; }

 private:
  static std::string line(const std::string& what, const std::string& where,
                          const std::string& expected, const std::string& found) {
    std::string s = where.empty() ? what : where + ": " + what;
    if (!expected.empty()) s += "; expected " + expected;
    if (!found.empty()) s += (expected.empty() ? "; found " : ", found ") + found;
    for (char& c : s)
      if (c == '\n' || c == '\r') c = ' ';
    return s;
  }
  ExitCode code_;
};

}  // namespace v3b
