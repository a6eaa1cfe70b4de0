// What a mistyped command line is told: the command or option that was not known, and the nearest one.
#pragma once
#include <CLI/CLI.hpp>
#include <string>
#include <vector>

namespace v3b::cli {

// The candidate with the fewest edits (insert, delete, replace, swap of neighbours), if at most a third of the word's
// letters and never more than 3; otherwise "".
std::string nearest(const std::string& word, const std::vector<std::string>& candidates);

// `words` are argv without the program, in order. "" when everything is known.
std::string unknown_command(const CLI::App& app, const std::vector<std::string>& words);
std::string unknown_option(const CLI::App& app, const std::vector<std::string>& words);

// "v3bench scenario kv-cache": the deepest command named.
std::string command_of(const CLI::App& app, const std::vector<std::string>& words);

}  // namespace v3b::cli
