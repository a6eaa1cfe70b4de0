#include "bench/harness/progress.h"

#include <fmt/format.h>
#include <sys/ioctl.h>
#include <unistd.h>

#include <cmath>
#include <cstdio>

namespace v3b::bench {
namespace {

constexpr double kTerminalSeconds = 0.1, kPlainSeconds = 5;

double seconds_since(std::chrono::steady_clock::time_point t) {
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - t).count();
}

std::string time_left(double s) {
  if (!std::isfinite(s)) return "";
  if (s < 90) return fmt::format(", {:.0f} s left", s);
  return fmt::format(", {:.0f} min left", s / 60);
}

}  // namespace

Progress::Progress(std::string title, double total)
    : title_(std::move(title)),
      total_(total),
      terminal_(isatty(STDERR_FILENO) != 0),
      start_(std::chrono::steady_clock::now()),
      last_(start_) {}

void Progress::show(const std::string& what) {
  what_ = what;
  draw(false);
}

void Progress::advance(double amount) {
  done_ += amount;
  draw(false);
}

void Progress::draw(bool force) {
  if (!force && seconds_since(last_) < (terminal_ ? kTerminalSeconds : kPlainSeconds)) return;
  last_ = std::chrono::steady_clock::now();
  const double share = total_ > 0 ? done_ / total_ : 1;
  const double left = share > 0.01 ? seconds_since(start_) * (1 - share) / share : INFINITY;
  std::string line = fmt::format("{}: {:.0f} of {:.0f} ({:.0f}%{}) {}", title_, std::floor(done_),
                                 total_, 100 * share, time_left(left), what_);
  if (!terminal_) {
    fmt::print(stderr, "{}\n", line);
    return;
  }
  winsize size{};
  size_t columns = 80;
  if (ioctl(STDERR_FILENO, TIOCGWINSZ, &size) == 0 && size.ws_col > 1) columns = size.ws_col - 1u;
  if (line.size() > columns) line.resize(columns);
  fmt::print(stderr, "\r\033[K{}", line);
  std::fflush(stderr);
  drawn_ = true;
}

void Progress::clear() {
  if (drawn_) fmt::print(stderr, "\r\033[K");
  drawn_ = false;
}

void Progress::finish() {
  clear();
  fmt::print(stderr, "{}: {:.0f} of {:.0f} done in {:.1f} s\n", title_, std::floor(done_ + 1e-6),
             total_, seconds_since(start_));
}

}  // namespace v3b::bench
