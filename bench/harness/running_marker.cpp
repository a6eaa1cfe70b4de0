#include "bench/harness/running_marker.h"

#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>
#include <fstream>

namespace v3b::bench {
namespace {

char g_path[4096] = "";

}  // namespace

std::string RunningMarker::take(const std::string& path) {
  std::string job;
  if (std::ifstream in(path); in) std::getline(in, job);
  ::unlink(path.c_str());
  return job;
}

RunningMarker::RunningMarker(const std::string& path) : path_(path) {
  if (path_.size() >= sizeof g_path) path_.clear();
  std::memcpy(g_path, path_.c_str(), path_.size() + 1);
}
RunningMarker::~RunningMarker() { remove_now(); }

void RunningMarker::set(const std::string& job) {
  if (path_.empty() || job == job_) return;
  job_ = job;
  const int fd = ::open(path_.c_str(), O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0644);
  if (fd < 0) return;  // the folder was proven writable; a full disk shows with the next row
  const std::string line = job + "\n";
  const ssize_t n = ::write(fd, line.data(), line.size());
  (void)n;
  ::close(fd);
}

void RunningMarker::remove_now() noexcept {
  if (g_path[0] != '\0') ::unlink(g_path);
  g_path[0] = '\0';
}

}  // namespace v3b::bench
