// Which CUDA implementations have passed their checks on real GPUs: kernels/hardware_runs.csv as it was when this binary
// was built. scripts/record_hardware.py adds lines from the rows of a run; nobody types them.
#pragma once
#include <string>

namespace v3b::bench {

inline constexpr const char* kNotYetOnHardware = "not yet run on hardware";

// "" for a CPU implementation; the GPUs' names joined by ", "; or kNotYetOnHardware.
std::string hardware_text(const std::string& impl);  // "rmsnorm.cuda_simt"
// The same from another text of that file (impl,gpu,date,commit with a header line).
std::string hardware_text(const std::string& impl, const std::string& csv);

}  // namespace v3b::bench
