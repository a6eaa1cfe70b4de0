// Which job is running, in a file beside the results, so that a process that ends without a word (a segmentation fault,
// the kernel's memory killer, a kernel that takes the driver with it) is not asked for the same job again by --resume.
#pragma once
#include <string>

namespace v3b::bench {

class RunningMarker {
 public:
  // What the run before left at `path`: a job name, or "". The file is removed.
  static std::string take(const std::string& path);

  explicit RunningMarker(const std::string& path);  // "": does nothing
  ~RunningMarker();                                 // removes the file
  RunningMarker(const RunningMarker&) = delete;
  RunningMarker& operator=(const RunningMarker&) = delete;
  void set(const std::string& job);  // one write(); the same name again costs nothing

  // For signal handlers: an interruption is no fault of the job. Removes the file of the marker that lives.
  static void remove_now() noexcept;

 private:
  std::string path_, job_;
};

}  // namespace v3b::bench
