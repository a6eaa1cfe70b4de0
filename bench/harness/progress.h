// Progress on stderr: count, share, time left. One line that is rewritten on a terminal; plain
// lines, a few seconds apart, when stderr is none.
#pragma once
#include <chrono>
#include <string>

namespace v3b::bench {

class Progress {
 public:
  Progress(std::string title, double total);
  void show(const std::string& what);  // what is being done now
  void advance(double amount);
  void clear();  // takes the line away before other output
  void finish();

 private:
  void draw(bool force);
  std::string title_, what_;
  double total_ = 0, done_ = 0;
  bool terminal_ = false, drawn_ = false;
  std::chrono::steady_clock::time_point start_, last_;
};

}  // namespace v3b::bench
