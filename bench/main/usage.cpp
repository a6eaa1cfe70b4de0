#include "bench/main/usage.h"

#include <algorithm>

namespace v3b::cli {
namespace {

std::vector<const CLI::App*> commands_of(const CLI::App& level) {
  return level.get_subcommands([](const CLI::App*) { return true; });
}

const CLI::App* find_command(const CLI::App& level, const std::string& name) {
  for (const CLI::App* sub : commands_of(level))
    if (sub->get_name() == name) return sub;
  return nullptr;
}

// The commands that the first words name, `app` first.
std::vector<const CLI::App*> path_of(const CLI::App& app, const std::vector<std::string>& words) {
  std::vector<const CLI::App*> path = {&app};
  for (const auto& w : words) {
    const CLI::App* next = find_command(*path.back(), w);
    if (next == nullptr) break;
    path.push_back(next);
  }
  return path;
}

size_t edits(const std::string& a, const std::string& b) {
  std::vector<std::vector<size_t>> d(a.size() + 1, std::vector<size_t>(b.size() + 1));
  for (size_t i = 0; i <= a.size(); ++i)
    for (size_t j = 0; j <= b.size(); ++j) {
      if (i == 0 || j == 0) {
        d[i][j] = i + j;
        continue;
      }
      d[i][j] = std::min(
          {d[i - 1][j] + 1, d[i][j - 1] + 1, d[i - 1][j - 1] + (a[i - 1] == b[j - 1] ? 0 : 1)});
      if (i > 1 && j > 1 && a[i - 1] == b[j - 2] && a[i - 2] == b[j - 1])
        d[i][j] = std::min(d[i][j], d[i - 2][j - 2] + 1);
    }
  return d[a.size()][b.size()];
}

std::string hint(const std::string& best) {
  return best.empty() ? "" : ", did you mean " + best + "?";
}

}  // namespace

std::string nearest(const std::string& word, const std::vector<std::string>& candidates) {
  constexpr size_t kMostEdits = 3;
  if (word.size() > 100) return "";
  size_t best = std::min(kMostEdits, (word.size() + 2) / 3) + 1;
  std::string found;
  for (const auto& c : candidates)
    if (const size_t n = edits(word, c); n < best) {
      best = n;
      found = c;
    }
  return found;
}

std::string unknown_command(const CLI::App& app, const std::vector<std::string>& words) {
  const auto path = path_of(app, words);
  const size_t at = path.size() - 1;  // the first word that is no command
  const auto known = commands_of(*path.back());
  if (known.empty() || at == words.size() || words[at].empty() || words[at][0] == '-') return "";
  std::vector<std::string> names;
  std::string all;
  for (const CLI::App* sub : known) {
    names.push_back(sub->get_name());
    all += (all.empty() ? "" : " ") + names.back();
  }
  return "unknown command '" + words[at] + "'" + hint(nearest(words[at], names)) +
         "; expected one of: " + all;
}

std::string unknown_option(const CLI::App& app, const std::vector<std::string>& words) {
  std::vector<std::string> names;
  for (const CLI::App* level : path_of(app, words))
    if (level != &app || words.empty() || words[0].starts_with("-"))
      for (const CLI::Option* o : level->get_options())
        for (const auto& n : o->get_lnames()) names.push_back("--" + n);
  for (const auto& w : words) {
    if (!w.starts_with("--") || w.size() == 2) continue;
    const std::string name = w.substr(0, w.find('='));
    if (std::find(names.begin(), names.end(), name) != names.end()) continue;
    return "unknown option '" + name + "'" + hint(nearest(name, names));
  }
  return "";
}

std::string command_of(const CLI::App& app, const std::vector<std::string>& words) {
  std::string name;
  for (const CLI::App* level : path_of(app, words))
    name += (name.empty() ? "" : " ") + level->get_name();
  return name;
}

}  // namespace v3b::cli
