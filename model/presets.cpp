// Where model files lie, and the named configurations in presets/.
#include <dirent.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cstdlib>

#include "model/config.h"
#include "model/error.h"

namespace v3b::model {

namespace {
bool is_dir(const std::string& path) {
  struct stat st {};
  return ::stat(path.c_str(), &st) == 0 && S_ISDIR(st.st_mode);
}
std::string binary_dir() {
  char buf[4096];
  const ssize_t n = ::readlink("/proc/self/exe", buf, sizeof buf - 1);
  if (n <= 0) return "";
  const std::string exe(buf, static_cast<size_t>(n));
  return exe.substr(0, exe.rfind('/'));
}
}  // namespace

std::string model_dir() {
  if (const char* env = std::getenv("V3BENCH_MODEL_DIR"); env && *env) {
    if (!is_dir(env))
      throw Error(ExitCode::not_found, "V3BENCH_MODEL_DIR", env, "a folder", "none");
    return env;
  }
  const std::string bin = binary_dir();
  if (!bin.empty() && is_dir(bin + "/model/presets")) return bin + "/model";
  if (is_dir(V3B_SOURCE_MODEL_DIR "/presets")) return V3B_SOURCE_MODEL_DIR;
  throw Error(ExitCode::not_found, "model folder", bin + "/model or " V3B_SOURCE_MODEL_DIR,
              "a folder with presets/", "none (set V3BENCH_MODEL_DIR)");
}

std::vector<std::string> preset_names() {
  std::vector<std::string> names;
  const std::string dir = model_dir() + "/presets";
  if (DIR* d = ::opendir(dir.c_str())) {
    while (const dirent* e = ::readdir(d)) {
      const std::string file = e->d_name;
      if (file.size() > 5 && file[0] != '.' && file.ends_with(".json"))
        names.push_back(file.substr(0, file.size() - 5));
    }
    ::closedir(d);
  }
  std::sort(names.begin(), names.end());
  return names;
}

ModelConfig load_preset(const std::string& name) {
  const std::vector<std::string> names = preset_names();
  if (std::find(names.begin(), names.end(), name) == names.end()) {
    std::string list;
    for (const std::string& n : names) list += (list.empty() ? "" : ", ") + n;
    throw Error(ExitCode::not_found, "no such preset", model_dir() + "/presets",
                list.empty() ? "a preset" : list, "\"" + name + "\"");
  }
  return load_config(model_dir() + "/presets/" + name + ".json");
}

}  // namespace v3b::model
