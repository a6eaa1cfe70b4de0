#include "reports/machine.h"

#include <fcntl.h>
#include <sched.h>
#include <signal.h>
#include <sys/utsname.h>
#include <unistd.h>

#include <cerrno>
#include <charconv>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>
#include <set>
#include <sstream>

#include "model/error.h"
#include "model/hash.h"

namespace v3b::rep {
namespace {

std::string first_line(const std::string& path) {
  std::ifstream in(path);
  std::string s;
  std::getline(in, s);
  return s;
}

int64_t cache_bytes(int level) {
  for (int i = 0; i < 8; ++i) {
    const std::string dir = "/sys/devices/system/cpu/cpu0/cache/index" + std::to_string(i) + "/";
    if (first_line(dir + "level") != std::to_string(level) ||
        first_line(dir + "type") == "Instruction")
      continue;
    std::istringstream in(first_line(dir + "size"));
    int64_t n = 0;
    char unit = ' ';
    in >> n >> unit;
    return unit == 'K' ? n << 10 : unit == 'M' ? n << 20 : n;
  }
  return 0;
}

void read_cpuinfo(MachineCard& c) {
  static const std::set<std::string> interesting = {
      "avx",      "avx2",     "fma",      "f16c",        "avx512f",     "avx512bw",
      "avx512dq", "avx512vl", "avx512cd", "avx512_bf16", "avx512_vnni", "avx512_fp16",
      "amx_tile", "amx_bf16", "amx_int8", "avx_vnni",    "avx512_vbmi", "avx512_vbmi2"};
  std::ifstream in("/proc/cpuinfo");
  std::string line, family, model, stepping;
  std::set<std::string> packages, cores;
  std::string package;
  while (std::getline(in, line)) {
    const size_t colon = line.find(':');
    if (colon == std::string::npos) continue;
    const std::string key = line.substr(0, line.find_last_not_of(" \t", colon - 1) + 1);
    const std::string value = colon + 2 <= line.size() ? line.substr(colon + 2) : "";
    if (key == "processor") ++c.logical;
    if (key == "model name") c.cpu_model = value;
    if (key == "cpu family") family = value;
    if (key == "model") model = value;
    if (key == "stepping") stepping = value;
    if (key == "physical id") packages.insert(package = value);
    if (key == "core id") cores.insert(package + "/" + value);
    if (key == "flags" && c.isa.empty()) {
      std::istringstream flags(value);
      for (std::string f; flags >> f;) {
        if (interesting.count(f) != 0) c.isa.push_back(f);
        if (f == "hypervisor") c.hypervisor = "yes";
      }
    }
  }
  c.microarch = "family " + family + ", model " + model + ", stepping " + stepping;
  c.sockets = packages.empty() ? 1 : static_cast<int>(packages.size());
  c.cores = cores.empty() ? c.logical : static_cast<int>(cores.size());
}

MachineCard collect() {
  MachineCard c;
  read_cpuinfo(c);
  cpu_set_t set;
  CPU_ZERO(&set);
  c.usable = sched_getaffinity(0, sizeof set, &set) == 0 ? CPU_COUNT(&set) : c.logical;
  c.l1d_bytes = cache_bytes(1);
  c.l2_bytes = cache_bytes(2);
  c.l3_bytes = cache_bytes(3);
  c.memory_bytes = static_cast<int64_t>(sysconf(_SC_PHYS_PAGES)) * sysconf(_SC_PAGESIZE);
  if (c.hypervisor.empty()) c.hypervisor = "no";
  c.governor = first_line("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor");
  c.huge_pages = first_line("/sys/kernel/mm/transparent_hugepage/enabled");
  utsname u{};
  if (uname(&u) == 0) c.kernel = std::string(u.sysname) + " " + u.release;
  std::ifstream os("/etc/os-release");
  for (std::string line; std::getline(os, line);)
    if (line.rfind("PRETTY_NAME=", 0) == 0) c.os = line.substr(13, line.size() - 14);
#if defined(__clang__)
  c.compiler = "clang " __clang_version__;
#else
  c.compiler = "gcc " __VERSION__;
#endif
  c.build_type = V3B_BUILD_TYPE;
  c.flags = V3B_BUILD_FLAGS;
  // Hardware that stays: a new kernel or compiler on the same machine keeps the id.
  std::string what = c.cpu_model + "|" + c.microarch + "|" + std::to_string(c.usable) + "|" +
                     std::to_string(c.l2_bytes) + "|" + std::to_string(c.l3_bytes) + "|" +
                     std::to_string(c.memory_bytes >> 30);
  for (const auto& f : c.isa) what += "|" + f;
  c.id = model::hex64(model::fnv1a64(what)).substr(0, 8);
  return c;
}

// What a killed process left half-written: <name>.tmp.<pid> and .v3bench-probe.<pid> of processes that are gone.
void remove_stale_files(const std::string& dir) {
  std::error_code ec;
  for (const auto& entry : std::filesystem::directory_iterator(dir, ec)) {
    const std::string name = entry.path().filename().string();
    const size_t dot = name.rfind('.');
    if (dot == std::string::npos) continue;
    const std::string stem = name.substr(0, dot);
    if (stem != ".v3bench-probe" && !stem.ends_with(".csv.tmp") && stem != "machine.json.tmp")
      continue;
    int pid = 0;
    const auto r = std::from_chars(name.data() + dot + 1, name.data() + name.size(), pid);
    if (r.ec != std::errc() || r.ptr != name.data() + name.size() || pid <= 0) continue;
    if (::kill(pid, 0) != 0 && errno == ESRCH) std::filesystem::remove(entry.path(), ec);
  }
}

}  // namespace

MachineCard& machine_card() {
  static MachineCard card = collect();
  return card;
}

void ensure_output_dir(const std::string& dir) {
  std::error_code ec;
  std::filesystem::create_directories(dir, ec);
  if (ec || !std::filesystem::is_directory(dir))
    throw Error(ExitCode::cannot_write, "output folder", dir, "a folder that can be made",
                ec ? ec.message() : "a file");
  remove_stale_files(dir);
  const std::string probe = dir + "/.v3bench-probe." + std::to_string(getpid());
  const int fd = ::open(probe.c_str(), O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0644);
  if (fd < 0)
    throw Error(ExitCode::cannot_write, "output folder", dir, "a writable folder",
                std::strerror(errno));
  ::close(fd);
  ::unlink(probe.c_str());
}

void write_machine_json(const std::string& dir) {
  const MachineCard& c = machine_card();
  nlohmann::ordered_json j = {{"machine", c.id},
                              {"cpu_model", c.cpu_model},
                              {"microarch", c.microarch},
                              {"isa", c.isa},
                              {"sockets", c.sockets},
                              {"cores", c.cores},
                              {"logical", c.logical},
                              {"usable", c.usable},
                              {"l1d_bytes", c.l1d_bytes},
                              {"l2_bytes", c.l2_bytes},
                              {"l3_bytes", c.l3_bytes},
                              {"memory_bytes", c.memory_bytes},
                              {"hypervisor", c.hypervisor},
                              {"governor", c.governor},
                              {"os", c.os},
                              {"kernel", c.kernel},
                              {"huge_pages", c.huge_pages},
                              {"compiler", c.compiler},
                              {"build_type", c.build_type},
                              {"flags", c.flags},
                              {"libraries", c.libraries},
                              {"peaks", c.peaks},
                              {"gpu", c.gpu}};
  const std::string path = dir + "/machine.json";
  // A later process of the same machine that probed less keeps what an earlier one measured here.
  if (std::ifstream in(path); in) {
    const auto old = nlohmann::ordered_json::parse(in, nullptr, false);
    if (old.is_object() && old.value("machine", "") == c.id && old.contains("peaks") &&
        old["peaks"].is_object())
      for (const auto& [name, value] : old["peaks"].items())
        if (value.is_number() && !(j["peaks"].contains(name) && j["peaks"][name] >= value))
          j["peaks"][name] = value;
  }
  const std::string temporary = path + ".tmp." + std::to_string(getpid());
  errno = 0;
  std::ofstream out(temporary, std::ios::binary);
  out << j.dump(2) << '\n';
  out.close();
  const int error = errno;
  std::error_code ec;
  if (out) std::filesystem::rename(temporary, path, ec);
  if (!out || ec) {
    const std::string why = !out ? std::strerror(error) : ec.message();
    std::filesystem::remove(temporary, ec);
    throw Error(ExitCode::cannot_write, "cannot write", path, "", why);
  }
}

}  // namespace v3b::rep
